"""Common English words for keys, and a small grammar that generates plain prose."""

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """amber ancient bitter bold brave brief bright broad calm clever cold copper curious dark deep dry dusty eager
    early empty faint fierce final gentle golden grand green grey happy heavy hidden hollow honest humble icy iron
    jolly kind late lazy little lonely loud lucky mild modern narrow noble odd pale patient plain polite proud quick
    quiet rapid rare rough round rusty sharp shy silent silver simple smooth soft steady stern strong sunny swift tall
    tame tender tidy tiny vast warm wide wild wise wooden young"""
)
NOUNS = _words(
    """anchor apple arrow badger barrel basket beacon bell blanket boat bottle bridge broom bucket button cabin candle
    canoe carpet castle chair clock cloak coin compass cradle crown donkey drum eagle falcon feather ferry fiddle flute
    fox garden glove goose hammer harbour harp hat hedge heron horse kettle kite ladder lamp lantern lemon letter lion
    lizard map market mirror mule needle oar orchard otter oven owl paddle parrot pebble pencil piano pigeon pillow
    plough pond puppet rabbit raven ribbon river rope saddle sail salmon shovel spoon squirrel stable statue stove
    table thimble tiger tower trumpet turtle valley violin wagon walnut whistle willow window wolf"""
)
VERBS = _words(
    """admired borrowed bought carried cleaned counted described drew dropped examined fetched followed forgot found
    guarded hid ignored kept lifted lost mended missed moved noticed painted praised pulled pushed remembered repaired
    sold stole touched traded wanted washed watched"""
)
PEOPLE = _words(
    """baker captain carpenter clerk cook doctor farmer fisherman gardener guard judge librarian merchant miller nurse
    painter pilot printer sailor shepherd singer smith student tailor teacher traveller weaver widow"""
)
_PLACES = (
    "at the edge of the village", "behind the old mill", "beside the road", "by the sea", "in the attic",
    "in the middle of the square", "near the station", "on the far side of the hill", "outside the school",
    "under the bridge", "across the bay", "at the back of the shop",
)  # fmt: skip
_TIMES = (
    "after the rain", "all summer long", "before anyone else was awake", "in the spring", "just before dark",
    "on the last day of the year", "on Sunday", "one winter night", "that evening", "the week after",
    "when the snow had melted", "while nobody was looking",
)  # fmt: skip
_PATTERNS = (
    "The {person} {verb} the {adjective} {noun} {place}.",
    "{Time}, the {person} {verb} a {plain} {noun}.",
    "Nobody knew why the {adjective} {noun} was {place}, and the {person} did not say.",
    "The {noun} was {adjective}, but the {other} was {plain}.",
    "A {plain} {person} {verb} the {noun} {time}.",
    "It was the {person} who {verb} the {adjective} {noun}.",
    "Was there a {plain} {noun} {place}?",
    "The {person} and the {friend} {verb} each other's {noun} {time}.",
    "There stood a {plain} {noun} {place}, and next to it a {other_plain} {other}.",
    "They said that the {person} {verb} every {noun} {place}.",
)
_VOWELS = "aeiou"
_AFTER_A = tuple(word for word in ADJECTIVES if word[0] not in _VOWELS)


def prose(count: int, seed: int = 0) -> list[str]:
    """Generate `count` sentences of 5 to 20 words, without digits. The same seed gives the same sentences."""
    draw = random.Random(seed)
    return [_sentence(draw) for _ in range(count)]


def _sentence(draw: random.Random) -> str:
    person, friend = draw.sample(PEOPLE, 2)
    noun, other = draw.sample(NOUNS, 2)
    time = draw.choice(_TIMES)
    return draw.choice(_PATTERNS).format(
        person=person, friend=friend, noun=noun, other=other, verb=draw.choice(VERBS),
        adjective=draw.choice(ADJECTIVES), plain=draw.choice(_AFTER_A), other_plain=draw.choice(_AFTER_A),
        place=draw.choice(_PLACES), time=time, Time=time[0].upper() + time[1:],
    )  # fmt: skip
