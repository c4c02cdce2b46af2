// A session answers a chat, with OpenAI's own package for Node: npm install openai. TITANS_BASE_URL says where the server is.
import OpenAI from "openai";

const url = process.env.TITANS_BASE_URL ?? "http://127.0.0.1:8000";
const ai = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.TITANS_API_KEY ?? "none" });

const model = (await ai.models.list()).data[0].id;
const conversation = await ai.conversations.create({
  items: [{ type: "message", role: "user", content: "The access code of the mossy lighthouse is 4819203." }],
});
const stream = await ai.chat.completions.create({
  model,
  session: conversation.id,
  messages: [{ role: "user", content: "What is the access code of the mossy lighthouse?" }],
  max_tokens: 40,
  temperature: 0,
  stream: true,
});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
const response = await ai.responses.create({
  model,
  conversation: conversation.id,
  input: "And what is it good for?",
  max_output_tokens: 40,
});
console.log(`\n${response.output_text}`);
await ai.conversations.delete(conversation.id);
