"""The vocabulary of the generated corpus: word lists and the fixed, seeded fact base.

Knows nothing of documents or tokens. Changing a list changes the corpus, so the tokenizer and
the shipped model would have to be trained again.
"""

import random
from dataclasses import dataclass

PEOPLE = tuple(
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mara Noah Olga Paul Rosa Sam "
    "Tina Victor".split()
)
PLACES = tuple(
    "kitchen garden attic cellar barn library workshop hallway bedroom stable tower orchard bakery "
    "market school harbour".split()
)
OBJECTS = tuple(
    "lamp ball book key basket bottle hammer blanket letter map drum kite mirror candle rope spoon "
    "violin coin hat clock ladder bucket flute apple".split()
)
COLOURS = tuple("red blue green yellow black white brown silver".split())
TRAITS = tuple(
    "kind clever quiet brave cheerful patient curious careful gentle honest lazy proud".split()
)
JOBS = tuple("baker farmer sailor teacher painter miller weaver doctor gardener smith".split())
HOMES = tuple(
    "a small house by the sea|an old mill near the river|a village in the hills|"
    "a farm at the edge of the forest|a stone house on the island|a quiet town in the valley".split(
        "|"
    )
)
WEATHER = tuple(
    "The sun was warm and the sky was clear.|It rained all morning.|A cold wind blew from the "
    "north.|Snow lay on the roofs.|The evening was calm and bright.|Fog covered the fields.|"
    "The birds were singing in the trees.|There was thunder far away.".split("|")
)
CLOSINGS = tuple(
    "Everyone was happy in the end.|They all went home before dark.|It had been a long day.|"
    "Nobody forgot that day.|Then they all sat down to eat.|At last it was time to sleep.".split(
        "|"
    )
)
# Keys and values of the recall lists. Each is one token (tests hold it), so that a recall answer
# is one decision of the model.
NOUNS = tuple(
    (
        "anchor arrow badge bamboo beetle berry bishop bolt bone brick bridge broom brush bubble "
        "button cabin cactus camel canoe canyon carpet castle cave chain cherry circle cliff cloud "
        "clover cobra comet copper coral cotton crab crane crow crown crystal daisy delta desert "
        "diamond dolphin donkey dragon eagle ember engine falcon feather fern ferry flame flint "
        "forest fossil fox frog ginger glacier globe goose granite grape hammock harp hawk hazel "
        "helmet heron honey horn iron island ivory jacket jaguar jewel jungle kettle kitten knight "
        "lagoon lantern lemon lily lion lizard lobster lotus magnet maple marble meadow melon "
        "mint monkey moon moose moss nectar needle nest nickel oak oasis ocean olive onion opal "
        "orchid otter owl oyster paddle palm panda panther parrot peach pearl pebble pepper pilot "
        "pine pirate planet plum pocket pony poppy prism puppy pyramid quartz rabbit raven reef "
        "ribbon river robin rocket ruby saddle salmon sand sapphire scarf shell shield sparrow "
        "spider spruce squid star storm summit swan sword temple thistle thunder tiger timber "
        "topaz torch tulip turtle umbrella valley velvet violet walnut walrus whale wheat willow "
        "winter wolf zebra"
    ).split()
)

_SYLLABLES = tuple("ba ko ri ven dor mel sa tu lin gar po na fel zu ma ther ol is qua bre".split())
FACT_SEED = 4
NUM_COUNTRIES = 40
ANIMALS = tuple("horse bear wolf stag lynx seal hare boar ram otter hawk crane".split())
FOODS = tuple("bread soup cheese fish rice honey cake beans plums nuts".split())


@dataclass(frozen=True, slots=True)
class Country:
    name: str
    capital: str
    river: str
    animal: str
    food: str
    colour: str


def fact_base() -> tuple[Country, ...]:
    """The invented countries that fact documents speak of. Always the same ones."""
    rng = random.Random(FACT_SEED)
    names: list[str] = []
    while len(names) < 3 * NUM_COUNTRIES:
        name = "".join(rng.sample(_SYLLABLES, rng.choice((2, 2, 3)))).capitalize()
        if name not in names:
            names.append(name)
    thirds = [names[i::3] for i in range(3)]
    return tuple(
        Country(
            name=f"{name}ia" if not name.endswith("a") else f"{name}land",
            capital=capital,
            river=river,
            animal=rng.choice(ANIMALS),
            food=rng.choice(FOODS),
            colour=rng.choice(COLOURS),
        )
        for name, capital, river in zip(*thirds, strict=True)
    )


# Only the tokenizer sees these: everyday words that people may type, so that they do not fall
# apart into letters. The model learns nothing about them.
EVERYDAY = tuple(
    (
        "a about above across act add after again against age ago air all almost alone along "
        "already also always am among an and another answer any appear are area arm around as ask "
        "at away baby back bad ball bank base be bear beat beautiful became because become bed "
        "been before began begin behind being believe below best better between big bird black "
        "blood blue board boat body both box boy bring brother brought brown build building built "
        "business busy but buy by call came can capital car care carry catch cause center change "
        "check child children choose church city class clean clear close cold colour come "
        "common company complete computer contain cook cool corner correct could country course "
        "cover cross cry cup cut dark data daughter day dead decide deep describe desk did die "
        "different dinner direct do does dog done door down draw dream drink drive drop dry during "
        "each early ear earth east easy eat edge education eight either end energy enough enter "
        "even evening ever every example eye face fact fair fall family famous far farm fast "
        "father fear feel feet felt few field fight figure fill final find fine finger finish fire "
        "first five floor fly follow food foot for force forget form found four free fresh friend "
        "from front full game gave general get girl give glass go gold gone good got government "
        "great green grew ground group grow guess had hair half hand happen happy hard has have "
        "he head health hear heart heat heavy held hello help her here high hill him himself his "
        "history hold hole home hope hot hour house how however hundred hunt husband ice idea if "
        "important in inside instead interest into is it its itself job join jump just keep kind "
        "king knew know language large last late laugh law lay lead learn least leave left leg "
        "less let life light like line list listen little live long look lose lost lot love low "
        "machine made make man many mark matter may maybe me mean measure meat meet memory men "
        "middle might mile milk million mind minute miss model moment money month more morning "
        "most mother mountain mouth move much music must my name nation near need never new next "
        "night nine no north nose not note nothing notice now number of off office often oh old on "
        "once one only open or order other our out outside over own page paper parent part party "
        "pass past pattern pay people perhaps person picture piece place plan plant play please "
        "point poor position possible power press problem produce program public pull push put "
        "question quick quiet rain ran reach read ready real reason record red remember repeat "
        "rest result return rich ride right rise road rock room round rule run said same sat save "
        "saw say school science sea second see seem self send sentence serve set seven several "
        "shall shape she ship shop short should show side sign silver simple since sing sister "
        "sit six size skin sleep slow small snow so soft soldier some something sometimes son song "
        "soon sound south space speak special spell spend spring stand start state stay step still "
        "stone stop store story street strong student study such sudden sugar summer sun sure "
        "surface system table take talk tall teach team tell ten test than thank that the their "
        "them then there these they thing think third this those though thought thousand three "
        "through time tired to today together told tomorrow too took top touch toward town train "
        "travel tree true try turn two under understand until up upon us use usual value very "
        "voice wait walk wall want war warm was wash watch water way we wear weather week weight "
        "well went were west what wheel when where whether which while white who whole whose why "
        "wide wife wild will win wind window wish with without woman wonder wood word work world "
        "would write wrong year yellow yes yet you young your"
    ).split()
)
