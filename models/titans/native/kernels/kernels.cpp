// What one token costs in arithmetic, without what it costs to call an operation: products of a few rows with large
// matrices, whole runs of a body's layers, a linear memory's reads and writes, and a token out of a vocabulary's scores.
// For x86-64 processors that multiply bfloat16 (AVX-512 BF16, VNNI).
//
// A product's rows, and a session's tokens, are computed each as it would be alone: how many there are changes no bit.
//
// Here and in the headers: B sessions · T tokens · R rows, B T where tokens are meant · N outputs · K inputs · D hidden ·
// H query heads · G kv heads · E head dim · W window · P persistent. Of a memory: H heads · K key dim · F floats of a key
// as the memory sees it · V value dim · C tokens before its own that a query is made of · S tokens of a chunk.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "layers.h"
#include "learning.h"
#include "margin.h"
#include "memory.h"
#include "numbers.h"
#include "products.h"
#include "protection.h"
#include "sampling.h"
#include "threads.h"

namespace {

Team alone(1);

// To wake the others takes as long as half a million products.
Team &fitting(Team &team, int64_t num_products) { return num_products < 1'000'000 ? alone : team; }

}  // namespace

extern "C" {

Team *titans_team(int size) { return new Team(size); }

void titans_end(Team *team) { delete team; }

// x [R, K] bfloat16 to y [R, N] bfloat16.
void titans_multiply(Team *team, const Matrix *matrix, int64_t rows, const uint16_t *x, uint16_t *y) {
    product(*team, *matrix, rows, x, [&](int64_t r, int64_t n, __m512 total) {
        narrow(total, y + r * matrix->num_outputs + n);
    });
}

// The same to y [R, N] float32.
void titans_score(Team *team, const Matrix *matrix, int64_t rows, const uint16_t *x, float *y) {
    product(*team, *matrix, rows, x, [&](int64_t r, int64_t n, __m512 total) {
        _mm512_storeu_ps(y + r * matrix->num_outputs + n, total);
    });
}

// norm(h) + readout y (null: there is none), h and y [R, D] bfloat16, to [R, D] bfloat16.
void titans_finish(Team *team, int64_t size, double eps, const float *weight, const Matrix *readout, int64_t rows,
                   const uint16_t *h, const uint16_t *y, uint16_t *to) {
    std::vector<float> read(readout ? rows * size : 0);
    if (readout)
        product(fitting(*team, rows * size * size), *readout, rows, y, [&](int64_t r, int64_t n, __m512 total) {
            _mm512_storeu_ps(read.data() + r * size + n, total);
        });
    std::vector<float> row(size);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < size; i += 16) _mm512_storeu_ps(row.data() + i, widen(h + r * size + i));
        norm(row.data(), weight, eps, size, row.data());
        for (int64_t i = 0; i < size; i += 16) {
            const __m512 more = readout ? _mm512_loadu_ps(read.data() + r * size + i) : _mm512_setzero_ps();
            narrow(_mm512_add_ps(_mm512_loadu_ps(row.data() + i), more), to + r * size + i);
        }
    }
}

// A token of each row of scores [R, N], as they are again afterwards.
void titans_draw(Team *team, int64_t rows, int64_t size, float *scores, const Choice *choices, int64_t *tokens) {
    Team &whose = rows == 1 ? alone : *team;
    whose.run([&](int index) {
        const Share ours = whose.share(rows, index);
        for (int64_t r = ours.begin; r < ours.end; ++r) tokens[r] = Row(scores + r * size, size, choices[r]).draw();
    });
}

// h [B, T, D] bfloat16 through layers that follow one another, in place. Session b has positions[b] tokens before, and
// of its T the first lengths[b] count, but for those whose position is below 0; what the others become means nothing.
// keys and values: of each layer, its rings [B, G, W, E] bfloat16, which move on.
void titans_layers(Team *team, const Body *body, const Layer *layers, int64_t num_layers, int64_t batch, int64_t length,
                   const int64_t *positions, const int64_t *lengths, uint16_t *h, uint16_t *const *keys,
                   uint16_t *const *values) {
    const Tokens tokens{batch, length, positions, lengths};
    const int64_t size = body->size, heads_size = body->num_heads * body->head_dim, rows = tokens.rows();
    Scratch all;
    all.h.resize(rows * size);
    all.qkv.resize(rows * layers[0].qkv.num_outputs);
    all.mixed.resize(rows * heads_size);
    all.inner.resize(rows * body->inner);
    for (int64_t i = 0; i < num_layers; ++i)
        for (const Matrix *matrix : {&layers[i].qkv, &layers[i].out, &layers[i].gate_up, &layers[i].down})
            (matrix->kind == SIXTEEN ? all.inputs.pairs : all.inputs.codes) = true;
    all.inputs.resize(rows, std::max({size, heads_size, body->inner}));
    for (int64_t r = 0; r < rows; ++r) all.turns.emplace_back(tokens.position(r), *body);
    for (int64_t i = 0; i < rows * size; i += 16) _mm512_storeu_ps(all.h.data() + i, widen(h + i));
    team->run([&](int index) {
        Own own;
        const int64_t shared = body->num_heads / body->num_kv_heads;
        own.scores.resize(shared * (body->window + body->num_persistent + BLOCK));
        own.rounded.resize(shared * body->head_dim);
        own.turned.resize(body->head_dim);
        own.normed.resize(size);
        for (int64_t i = 0; i < num_layers; ++i)
            run_layer(*body, layers[i], tokens, keys[i], values[i], all, own, *team, index);
    });
    for (int64_t i = 0; i < rows * size; i += 16) narrow(_mm512_loadu_ps(all.h.data() + i), h + i);
}

// What a memory answers to h [B, T, D] bfloat16, writing nothing: y [B, T, D] bfloat16. Session b's weights, [H, F, V]
// float32, are at weights + b * stride. recent [B, C, D] bfloat16: its last inputs; moved: those after its first
// lengths[b] tokens. kept: the keys that it wrote last, [H, N, K + 1] in eight bits, are at kept + b * kept_stride; null: no answer
// is doubted.
void titans_read(Team *team, const Memory *memory, int64_t batch, int64_t length, const int64_t *lengths,
                 const uint16_t *h, const float *weights, int64_t stride, const uint16_t *recent, const int8_t *kept,
                 int64_t kept_stride, uint16_t *y, uint16_t *moved) {
    const Memory &m = *memory;
    const int64_t size = m.size, rows = batch * length, features = m.features();
    const int64_t width = m.num_heads * m.key_dim, values = m.num_heads * m.value_dim;
    Heard heard(m, batch, length, recent);
    Inputs answers{.pairs = true};
    answers.resize(rows, values);
    std::vector<float> projected(heard.rows() * width), gates(rows * values), reads(rows * values);
    std::vector<float> margins(kept ? rows * m.num_heads : 0);
    std::vector<uint8_t> answered(rows);  // whether anything passes
    team->run([&](int index) {
        std::vector<float> row(std::max(size, values)), queries(TOGETHER * features), own(m.products + m.key_dim);
        const Share ours = team->share(rows, index);
        for (int64_t r = ours.begin; r < ours.end; ++r) heard.take(m, r, h, row.data());
        team->barrier.wait();
        multiply(m.query, team->share(width / BLOCK, index), heard.joined, heard.rows(),
                 [&](int64_t r, int64_t n, __m512 x) { _mm512_storeu_ps(projected.data() + r * width + n, x); });
        multiply(m.out_gate, team->share(values / BLOCK, index), heard.fresh, rows, [&](int64_t r, int64_t n, __m512 x) {
            const __m512 gate = sigmoid(_mm512_add_ps(x, _mm512_loadu_ps(m.out_gate_bias + n)));
            _mm512_storeu_ps(gates.data() + r * values + n, gate);
        });
        team->barrier.wait();
        const Share units = team->share(batch * m.num_heads, index);
        for (int64_t unit = units.begin; unit < units.end; ++unit) {
            const int64_t b = unit / m.num_heads, head = unit % m.num_heads;
            const float *asked = weights + b * stride + head * features * m.value_dim;
            for (int64_t t = 0; t < length; t += TOGETHER) {
                const int64_t some = std::min<int64_t>(TOGETHER, length - t);
                for (int64_t i = 0; i < some; ++i) {
                    const float *asked_by = projected.data() + (b * (m.reach + length) + t + i) * width;
                    factors(m, head, asked_by, m.query_taps, own.data() + m.products);
                    feature(m, own.data() + m.products, queries.data() + i * features);
                }
                look_up(queries.data(), some, asked, features, m.value_dim,
                        reads.data() + (b * length + t) * values + head * m.value_dim, values);
            }
        }
        team->barrier.wait();
        for (int64_t r = ours.begin; r < ours.end; ++r) {
            for (int64_t v = 0; v < values; v += 16) {
                const __m512 x = _mm512_loadu_ps(reads.data() + r * values + v);
                _mm512_storeu_ps(row.data() + v, _mm512_mul_ps(x, _mm512_loadu_ps(gates.data() + r * values + v)));
            }
            answers.take(r, row.data(), values);
        }
        team->barrier.wait();
        multiply(m.out, team->share(size / BLOCK, index), answers, rows,
                 [&](int64_t r, int64_t n, __m512 x) { narrow(x, y + r * size + n); });
        if (m.read_threshold > 0) {
            team->barrier.wait();
            for (int64_t r = ours.begin; r < ours.end; ++r) {
                Answer answer(size, y + r * size);
                const double share = passed(m.read_threshold, answer.rms);
                answer.scale(share);
                answered[r] = share > 0;
            }
        }
        if (kept && m.margin_threshold > 0) {
            team->barrier.wait();
            Told told(m);
            for (int64_t unit = units.begin; unit < units.end; ++unit) {
                const int64_t b = unit / m.num_heads, head = unit % m.num_heads;
                std::vector<int64_t> asking;  // of a text mostly none
                for (int64_t t = 0; t < length; ++t)
                    if (answered[b * length + t]) asking.push_back(t);
                if (asking.empty()) continue;
                told.take(kept + b * kept_stride + head * m.protected_keys * (m.key_dim + 1));
                for (size_t start = 0; start < asking.size(); start += TOGETHER) {
                    const int64_t some = std::min<int64_t>(TOGETHER, asking.size() - start);
                    for (int64_t i = 0; i < some; ++i) {
                        const float *asked_by = projected.data() + (b * (m.reach + length) + asking[start + i]) * width;
                        factors(m, head, asked_by, m.query_taps, own.data() + m.products);
                        feature(m, own.data() + m.products, queries.data() + i * features);
                    }
                    float found[TOGETHER];
                    told.margins(m, queries.data(), some, found);
                    for (int64_t i = 0; i < some; ++i)
                        margins[(b * length + asking[start + i]) * m.num_heads + head] = found[i];
                }
            }
            team->barrier.wait();
            for (int64_t r = ours.begin; r < ours.end; ++r) {
                if (!answered[r]) continue;
                const float *of_heads = margins.data() + r * m.num_heads;
                const double margin = std::accumulate(of_heads, of_heads + m.num_heads, 0.0) / m.num_heads;
                const double past = (margin - m.margin_threshold) / (m.whole_margin - m.margin_threshold);
                const double share = std::clamp(past, 0.0, 1.0);
                Answer answer(size, y + r * size);
                answer.scale(share + (1 - share) * m.read_threshold / std::max(answer.rms, m.read_threshold));
            }
        }
    });
    heard.move(lengths, moved);
}

// A memory after the first lengths[b] tokens of h [B, T, D] bfloat16, answering none. Session b's weights, [H, F, V]
// float32, are at weights + b * stride, its momentum, of each head the last R steps' directions [R, F] and what is left
// of what they moved [R, V], at momentum + b * momentum_stride (null: it has none); neither is changed. new_weights,
// new_momentum: the same after, of all sessions in a row. recent and moved as in titans_read. kept [B, H, N, K + 1]
// in eight bits: the keys written last (protection.h); newly_kept: the same after. Null where none is protected.
void titans_write(Team *team, const Memory *memory, int64_t batch, int64_t length, const int64_t *lengths,
                  const uint16_t *h, const float *weights, int64_t stride, const float *momentum,
                  int64_t momentum_stride, const uint16_t *recent, const int8_t *kept, float *new_weights,
                  float *new_momentum, uint16_t *moved, int8_t *newly_kept) {
    const Memory &m = *memory;
    const int64_t size = m.size, rows = batch * length, joined = m.reach + length, head_size = m.features() * m.value_dim;
    const int64_t steps_size = m.momentum_reach * (m.features() + m.value_dim);
    const int64_t width = m.num_heads * m.key_dim, values = m.num_heads * m.value_dim;
    Heard heard(m, batch, length, recent);
    std::vector<float> projected(heard.rows() * width), offered(heard.rows() * values);
    std::vector<Gates> gates(rows * m.num_heads);
    team->run([&](int index) {
        const int64_t own_size = m.products + m.key_dim;
        std::vector<float> row(size), input(size * (m.gate_reach + 1)), own(m.chunk * own_size);
        std::vector<Token> tokens(m.chunk);
        const Share ours = team->share(rows, index);
        for (int64_t r = ours.begin; r < ours.end; ++r) heard.take(m, r, h, row.data());
        team->barrier.wait();
        const auto keep = [](std::vector<float> &to, int64_t columns) {
            return [&to, columns](int64_t r, int64_t n, __m512 x) { _mm512_storeu_ps(to.data() + r * columns + n, x); };
        };
        for (int64_t r = ours.begin; r < ours.end; ++r) {
            const int64_t first = r + (r / length + 1) * m.reach - m.gate_reach;
            for (int64_t i = 0; i < size * (m.gate_reach + 1); i += 16)
                _mm512_storeu_ps(input.data() + i, widen(heard.joined.rounded.data() + first * size + i));
            for (int64_t i = 0; i < size; i += 16)
                _mm512_storeu_ps(row.data() + i, convolve(input.data() + i, m.gate_taps + i, m.gate_reach, size));
            for (int64_t head = 0; head < m.num_heads; ++head)
                gates[r * m.num_heads + head] = gates_of(m, head, row.data());
        }
        team->barrier.wait();
        if (writes(gates.data(), rows * m.num_heads, 1)) {  // of a text mostly not
            multiply(m.key, team->share(width / BLOCK, index), heard.joined, heard.rows(), keep(projected, width));
            multiply(m.value, team->share(values / BLOCK, index), heard.joined, heard.rows(), keep(offered, values));
            team->barrier.wait();
        }
        Chunk chunk(m);
        Kept last(m);
        const Share units = team->share(batch * m.num_heads, index);
        for (int64_t unit = units.begin; unit < units.end; ++unit) {
            const int64_t b = unit / m.num_heads, head = unit % m.num_heads;
            const float *from = weights + b * stride + head * head_size;
            float *to = new_weights + unit * head_size;
            if (kept) last.take(kept + unit * last.size(), lengths[b]);
            if (momentum) chunk.take_steps(momentum + b * momentum_stride + head * steps_size);
            if (!lengths[b]) std::copy_n(from, head_size, to);
            for (int64_t start = 0; start < lengths[b]; start += m.chunk) {
                const int64_t count = std::min(m.chunk, lengths[b] - start);
                const Gates *of_chunk = gates.data() + (b * length + start) * m.num_heads + head;
                if (!writes(of_chunk, count, m.num_heads)) {
                    Fading fading;
                    for (int64_t t = 0; t < count; ++t) fading.pass(of_chunk[t * m.num_heads]);
                    fade(chunk, fading, count, from, to);
                    from = to;
                    continue;
                }
                for (int64_t t = 0; t < count; ++t) {
                    const int64_t r = b * joined + start + t;
                    float *made_of = own.data() + m.products + t * own_size, *key = chunk.keys.data() + t * m.features();
                    factors(m, head, projected.data() + r * width, m.key_taps, made_of);
                    const float size = feature(m, made_of, key);
                    const int64_t v = head * m.value_dim;
                    for (int64_t i = 0; i < m.value_dim; i += 16) {
                        const __m512 x = convolve(offered.data() + r * values + v + i, m.value_taps + v + i, m.reach, values);
                        _mm512_storeu_ps(chunk.errors.data() + t * m.value_dim + i, _mm512_sub_ps(_mm512_setzero_ps(), x));
                    }
                    chunk.gates[t] = of_chunk[t * m.num_heads];
                    tokens[t] = {key, made_of, size, chunk.gates[t].theta, chunk.along(t)};
                    if (!kept) std::copy_n(key, m.features(), chunk.along(t));
                }
                if (kept) last.learn(m, tokens.data(), count);
                learn_chunk(m, chunk, count, from, to);
                from = to;
            }
            if (kept) last.give(newly_kept + unit * last.size());
            if (momentum) chunk.give_steps(new_momentum + unit * steps_size);
        }
    });
    heard.move(lengths, moved);
}

}  // extern "C"
