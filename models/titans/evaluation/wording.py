"""Words and sentences that facts are made of. What the training and the test split list has nothing in common, but for
two beginnings of answers, and two places that are named after what training has as things (a lantern, a quarry).

In sentences {a} is what is told (an attribute), {t} the thing it is told of; the value follows a statement's beginning.
Training's sentences are of a list, or put together from parts: a memory that has seen thousands is not told a fact by
how it is worded.
"""

import random
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Asking:
    """A way to ask, and how a full answer begins, up to the value."""

    question: str
    lead: str


ADJECTIVES: dict[Split, list[str]] = {
    "train": """amber ancient arctic azure blue bold brass brave bright broken bronze calm carved clever copper coral
    cosmic crimson crystal curious dark distant dusty eager early eastern elegant emerald empty faded fallen famous
    floating forgotten frozen gentle giant gilded glass golden gray green hidden hollow humble icy iron ivory jade
    jolly lively lonely lost lucky lunar marble mellow merry misty modern narrow noble northern old orange painted pale
    patient pink plain polished proud purple quiet rapid rare red restless royal rugged rustic sacred secret shining
    silent silver simple sleepy smooth solar southern spare steady stone strange sunny swift tall thirsty tiny twisted
    velvet vivid wandering warm western white wild windy winter wise wooden yellow young""".split(),
    "test": """scarlet cobalt weathered tranquil ornate crooked slender violet sturdy radiant mossy brittle gloomy
    speckled sapphire drowsy foggy graceful hasty luminous""".split(),
}
NOUNS: dict[Split, list[str]] = {
    "train": """anchor archive arrow balcony barge barrel basket beacon bell bicycle bottle bridge cabin cable camera
    candle canoe canyon carriage cart castle cavern chapel chest chimney clock coach compass cottage cradle crane
    crown cupboard dagger desk door dragon drum engine falcon farm fence ferry flag forge fountain fox galley garden
    gate glacier glider guitar hammer harbor hat helmet hotel island jacket jar kettle key kite ladder lake lamp
    lantern ledger library lion lock locomotive mill mine mirror monument mountain museum needle oven owl painting
    palace parcel pearl piano pigeon pillar pipe planet plow pond printer quarry raft razor reservoir ring river
    robot rocket rope sailor saddle school ship shovel sled statue station stove sword table telescope temple tent
    theater ticket tiger tower tractor train trumpet trunk tunnel turtle umbrella valley vase vault violin wagon
    wallet warehouse watch well whistle wolf workshop""".split(),
    "test": """lighthouse orchard windmill locket schooner greenhouse sundial accordion granary tapestry trellis obelisk
    gondola furnace pavilion sextant turret anvil caravan chalice""".split(),
}
FIRST_NAMES: dict[Split, list[str]] = {
    "train": """Adam Agnes Albert Alice Amos Anna Arthur Beatrice Benjamin Bertha Caleb Carl Caroline Cecil Clara Daniel
    David Dora Edith Edmund Eleanor Ella Emma Ernest Esther Felix Flora Frances Frank George Gilbert Grace Hannah Harold
    Harriet Helen Henry Hugo Ida Isaac Jacob James Jane Joseph Julia Laura Leonard Lewis Lucy Luke Mabel Margaret Maria
    Martha Matthew Maud Nathan Nora Oscar Patrick Paul Peter Philip Rachel Ralph Robert Rose Ruth Samuel Sarah Simon
    Sophia Stephen Susan Theodore Thomas Victor Walter William""".split(),
    "test": "Ambrose Cordelia Desmond Florence Gideon Horace Imogen Jasper Lydia Mortimer Octavia Percival".split(),
}
LAST_NAMES: dict[Split, list[str]] = {
    "train": """Abbott Archer Baker Barlow Bates Bennett Bishop Booth Bowen Brooks Burton Carter Chapman Clayton Coleman
    Conway Cooper Crane Curtis Dalton Dawson Dixon Draper Ellis Fairfax Farmer Fisher Fletcher Foster Fowler Gardner
    Gibson Graham Grant Griffin Hale Hardy Harper Hayes Hicks Holt Hooper Hudson Irving Jarvis Jennings Keller Lambert
    Lawson Lowell Marsh Mason Mercer Morton Nash Norris Osborne Palmer Parker Pearce Porter Potter Quinn Ramsey Reed
    Rhodes Sawyer Shaw Sheldon Spencer Stokes Sutton Thorpe Tucker Turner Vance Wade Walker Warner Watts Webb Wells
    Whitaker Winslow Wright""".split(),
    "test": "Ashcroft Blackwood Carmichael Devereux Eastwood Fairchild Hargreaves Kingsley Lockhart Pemberton".split(),
}
PLACES: dict[Split, list[str]] = {
    "train": """Abbey Bridge Canal Castle Cedar Chapel Cherry Church Corn Elm Ferry Fleet Forest Garden Grove Harbour
    High Hill King Lake Lime Market Meadow Mill Oak Park Pond Queen River School Spring Station Temple Tower Wall Water
    Well Willow""".split(),
    "test": "Beech Foundry Juniper Lantern Priory Quarry Saddler Vineyard Weaver Windmill".split(),
}
WORDS: dict[Literal["test"], list[str]] = {
    "test": """apricot badger ballast bramble canary cinnamon clover comet cricket dahlia domino ember feather fiddle
    garnet ginger hammock heron hickory indigo juggler kestrel lobster magnet mango marigold nutmeg otter paprika
    pebble pepper pretzel saffron satchel sparrow thimble tulip walnut whisker zephyr""".split(),
}
LISTED_WORDS = frozenset(
    word.lower()
    for words in (
        *(words for split in (ADJECTIVES, NOUNS, FIRST_NAMES, LAST_NAMES, PLACES) for words in split.values()),
        WORDS["test"],
    )
    for word in words
)  # all words of the lists above: no other word of training is one of these
STREETS = "Street Road Lane Square Terrace Avenue".split()
MONTHS = "January February March April May June July August September October November December".split()
UNITS = "acres barrels bushels crowns dollars feet gallons guineas inches miles ounces pounds tons years yards".split()

STATEMENTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "The {a} of the {t} is",
        "The {a} for the {t} is",
        "Remember that the {a} of the {t} is",
        "As everybody there knew, the {a} of the {t} was",
        "It was written there that the {a} of the {t} is",
        "One of the special {a}s for the {t} is:",
        "One of the secret {a}s for {t} is:",
        "For the {t}, the {a} is",
        "The {t} has the {a}",
        "They had given the {t} the {a}",
        "The {t}'s {a} is",
        "Note down the {a} of the {t}:",
        "Someone asked for the {a} of the {t}, and the answer was",
        "The {t} was known by its {a}, which is",
        "The {a} that belongs to the {t} is",
        "Among other things, the {a} of {t} is given as",
    ),
    "test": (
        "The {a} belonging to the {t} turned out to be",
        "Nobody forgot that the {t} had the {a}",
        "On a label of the {t} stood the {a}",
        "We were told that the {t} goes by the {a}",
        "In the register the {t} is listed with the {a}",
    ),
}
_OPENINGS = (
    "",
    "",
    "",
    "",
    "Remember that ",
    "As everybody there knew, ",
    "It was written there that ",
    "It is well known that ",
    "They say that ",
    "I have it from my uncle that ",
    "In the end ",
    "From that day ",
    "Please note that ",
    "For all we know ",
    "Among other things, ",
    "She wrote to me that ",
    "He read out that ",
    "By the way, ",
    "The clerk told him that ",
    "Let me add that ",
    "Once more: ",
    "There it says that ",
    "Mark this: ",
    "Nobody could deny that ",
    "Late that night he learnt that ",
    "To this day ",
    "If I am not mistaken, ",
    "It may be of use that ",
    "The old people say that ",
    "So far as I could gather, ",
    "Without a doubt ",
    "It was printed in small letters that ",
    "He had heard at the inn that ",
    "And then, as everyone could see, ",
    "Their letter says that ",
    "At the time ",
    "For what it is worth, ",
    "Keep in mind that ",
)
_SUBJECTS = (
    "the {a} of the {t}",
    "the {a} of the {t}",
    "the {a} for the {t}",
    "the {t}'s {a}",
    "the {a} of {t}",
    "the {a} for {t}",
    "the {a} that belongs to the {t}",
    "the {a} given to the {t}",
    "the {a} which the {t} has",
    "the {a} kept for the {t}",
    "that {a} of the {t}",
    "the only {a} of the {t}",
    "the {a} they use for the {t}",
    "the {a} of the said {t}",
)
_VERBS = (
    "is",
    "was",
    "is still",
    "has always been",
    "proved to be",
    "came out as",
    "remains",
    "must be",
    "is said to be",
    "was set to",
    "is given as",
    "reads",
    "became",
    "would be",
    "is known to be",
    "was found to be",
    "had been changed to",
    "is no other than",
    "will be",
    "is:",
    "was this:",
    "can only be",
    "has in the end become",
    "is now, and will stay,",
    "happened to be",
    "is beyond all doubt",
    "was, to everyone's surprise,",
    "had by then come to be",
    "is, if you care to know,",
    "is written down as",
    "was read aloud as",
    "shall from now on be",
    "cannot be anything but",
    "is, as I said,",
    "was always going to be",
    "appears to be",
    "came to be",
    "is recorded as",
    "was announced as",
)
_HOLDINGS = (
    "the {t} has the {a}",
    "the {t} bears the {a}",
    "the {t} carries the {a}",
    "the {t} was given the {a}",
    "the {t} received the {a}",
    "the {t} was known by the {a}",
    "the {t} is kept under the {a}",
    "the {t} came to us with the {a}",
    "the {t} still answers to the {a}",
    "to the {t} belongs the {a}",
    "to the {t} they gave the {a}",
    "under the {t} one could read the {a}",
    "beside the {t} there was a note with the {a}",
    "whoever wants the {t} has to name the {a}",
    "the books have the {t} under the {a}",
    "you will find the {t} by the {a}",
    "for the {t}, the {a} is",
    "the {t} has this {a}:",
    "{t}, {a}:",
    "{a} of the {t}:",
    "the {t} makes do with the {a}",
    "the {t} has been marked with the {a}",
    "the {t}, as they told him, has the {a}",
    "the {t} was sold together with the {a}",
    "the {t} will be found to have the {a}",
    "on the back of the {t} was the {a}",
    "they wrote down, for the {t}, the {a}",
    "he gave, when they asked him about the {t}, the {a}",
    "nothing is known of the {t} but the {a}",
    "all papers of the {t} show the {a}",
    "a plate on the {t} gives the {a}",
    "the {t} needs the {a}",
    "this is the {a} of the {t}:",
    "here is what the {t} has for its {a}:",
    "the {t}; {a}:",
    "my note on the {t} has the {a}",
    "the {t} and its {a}:",
)
ENDINGS: dict[Split, tuple[str, ...]] = {
    "train": (
        ".",
        ".",
        ".",
        ".",
        ".",
        ".",
        ", as far as anybody knows.",
        ", and nobody ever changed it.",
        "; so at least it was said.",
        ", which was soon forgotten.",
        ", or so they believed.",
        " since that day.",
        ", to be exact.",
        " and nothing else!",
        "; he was quite sure of it.",
        ", as we shall see.",
        " (so it says).",
    ),
    "test": (".", ", if memory serves.", ", which surprised no one."),
}
_REQUESTS = (
    "What is {s}?",
    "What is {s}?",
    "What was {s}?",
    "What would be {s}?",
    "Tell me {s}.",
    "Could you tell me {s}?",
    "Do you remember {s}?",
    "Do you know {s}?",
    "I need {s}.",
    "I need to know {s}. What is it?",
    "Give me {s}, please.",
    "Please name {s}.",
    "What do you know about {s}?",
    "According to the text, what is {s}?",
    "What does the story say about {s}?",
    "Remind me of {s}.",
    "Somebody asked me for {s}. What do I answer?",
    "Is there anything about {s} in what you read?",
    "Quote {s} as it was written.",
    "I am looking for {s}. Where does it say?",
    "Where you read about {s}, what did it say?",
    "{s}, please.",
    "{s}?",
    "Which {a} does the {t} have?",
    "What {a} does the {t} have?",
    "What {a} was given to the {t}?",
    "By which {a} do they know the {t}?",
    "Under what {a} is the {t} kept?",
    "As to the {t}, which {a} is named?",
    "Did the {t} get a {a}, and which?",
    "You read about the {t}. What is the {a}?",
    "Now, what about {s}?",
    "Does the text mention {s}?",
    "Let me have {s}.",
    "Write down {s} for me.",
    "I would like to hear {s}.",
    "Say {s} once more.",
    "One more question: {s}?",
    "Which one was {s}?",
    "For the record, what is {s}?",
    "From what you have read, {s}?",
    "If you had to name {s}, what would you say?",
    "Any idea what {s} might be?",
    "Complete this: {s}.",
    "Somewhere it tells {s}. What is it?",
    "The {t}, you will remember, has a {a}. Which?",
    "How would you fill in the {a} of the {t}?",
    "With which {a} does the {t} come?",
    "There was a {t}. What was said about the {a}?",
    "Look for the {t} and tell me the {a}.",
    "They want the {a}, and it is for the {t}.",
)
ASKINGS: dict[Split, tuple[Asking, ...]] = {
    "train": (
        Asking("What is the {a} of the {t}?", "The {a} of the {t} is"),
        Asking("What is the {a} for the {t}?", "The {a} for the {t} is"),
        Asking("What is the {t}'s {a}?", "The {t}'s {a} is"),
        Asking("What {a} does the {t} have?", "The {t} has the {a}"),
        Asking("Tell me the {a} of the {t}.", "The {a} of the {t} is"),
        Asking("Do you remember the {a} for the {t}?", "The {a} for the {t} is"),
        Asking("Which {a} belongs to the {t}?", "The {a} that belongs to the {t} is"),
        Asking("According to the text, what is the {a} of {t}?", "According to the text, the {a} of {t} is"),
        Asking("Please give the {a} for {t} that you have read.", "The {a} for {t} that you have read is"),
        Asking("I need the {a} of the {t}. What was it?", "The {a} of the {t} was"),
        Asking("What is the {a} for {t} given in the text above?", "The {a} for {t} given in the text above is"),
    ),
    "test": (
        Asking("Can you say which {a} the {t} had?", "The {t} had the {a}"),
        Asking("I have forgotten the {a} of the {t}; could you look it up?", "The {a} of the {t} is"),
        Asking("The {t}: what was its {a} again?", "The {t}'s {a} was"),
        Asking("How does the text put the {a} of the {t}?", "The text puts the {a} of the {t} as"),
    ),
}
FULL_ANSWER = "The {a} of the {t} is"  # how training lets an answer begin that is the model's own
_HOLDING = 0.3  # of them: "the {t} has the {a}" and the like
_COMPOSED = 0.7  # share of training's sentences that are put together


def a_statement(split: Split, rng: random.Random) -> str:
    """How a sentence that states a fact begins, up to the value."""
    if split == "test" or rng.random() > _COMPOSED:
        return rng.choice(STATEMENTS[split])
    return _capital(rng.choice(_OPENINGS) + _clause(rng))


def an_asking(split: Split, rng: random.Random) -> Asking:
    """A question, and the beginning of an answer to it."""
    if split == "test" or rng.random() > _COMPOSED:
        return rng.choice(ASKINGS[split])
    subject = rng.choice(_SUBJECTS)
    return Asking(_capital(rng.choice(_REQUESTS).replace("{s}", subject)), _capital(_clause(rng)))


def _clause(rng: random.Random) -> str:
    """The part of a statement that names the thing and what is told of it."""
    if rng.random() < _HOLDING:
        return rng.choice(_HOLDINGS)
    return f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)}"


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
