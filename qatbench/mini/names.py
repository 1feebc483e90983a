"""Word lists of the drawn world; every name in it is made up or an everyday word."""

from __future__ import annotations


def words(table: str) -> tuple[str, ...]:
    """Split a table at white space."""
    return tuple(table.split())


FIRST_NAMES = words(
    "Ada Alma Anton Arlo Beata Boris Bruno Carla Celia Cora Dario Dina Edgar Elias Elsa Emil"
    " Enzo Fabio Fay Felix Flora Gala Gideon Greta Hanna Hugo Ida Igor Ines Iris Ivo Jana Jonas"
    " Julia Kai Kira Lars Lena Leo Lotte Luca Mara Milo Mina Nadia Nico Nora Olga Otto Pablo"
    " Petra Quinn Rosa Rufus Silas Stella Tara Theo Tilda Ugo Vera Viktor Wanda Yara"
)
LAST_NAMES = words(
    "Abbot Alder Archer Barlow Becker Birch Bishop Bolton Brook Carver Castle Cobb Cooper Crane"
    " Dale Drake Dunn Ellis Farrow Finch Fisher Flint Forge Frost Gable Garner Glover Grove Hale"
    " Harper Hawke Heath Hollis Hunter Ivory Jarvis Keats Kemp Knox Lark Lowell Marsh Mason"
    " Mercer Nash North Oakes Paget Penn Piper Quill Reeve Rowe Sadler Shaw Slater Stone Thorne"
    " Tyler Vance Wade Weaver Wells York"
)
TOWNS = words(
    "Fernholt Garrow Hexley Jorvik Kelmoor Lindale Marwick Nordhaven Pelham Rosmark Seldon"
    " Tarnwell Ulverton Vexford Wynmouth Xanholm Yarbrook Zelbury"
)  # a letter each of draw.TOWN_LETTERS, in that order
JOBS = words(
    "baker barber builder butcher carpenter chemist clerk dancer dentist diver doctor driver"
    " farmer firefighter florist gardener guard guide hunter jeweler judge lawyer librarian"
    " mechanic miner nurse painter pilot plumber poet porter potter sailor singer smith surgeon"
    " tailor teacher waiter writer"
)
PETS = words(
    "canary cat chicken crab dog donkey duck ferret frog gecko goat goldfish goose hamster"
    " hedgehog horse lizard mouse owl parrot pig pony rabbit raven sheep snail snake spider"
    " squirrel tortoise turkey turtle"
)
INSTRUMENTS = words(
    "accordion banjo bassoon bugle cello clarinet drum fiddle flute guitar harmonica harp horn"
    " lute mandolin oboe organ piano piccolo saxophone tambourine trombone trumpet tuba ukulele"
    " viola violin whistle xylophone zither"
)
FOODS = words(
    "apples bananas beans beets bread butter cabbage cake carrots cheese cherries corn dates"
    " eggs figs fish grapes ham honey lemons lentils melons mushrooms noodles nuts oats olives"
    " onions pancakes pasta peaches pears peas pickles plums porridge potatoes pumpkin rice"
    " salad soup spinach toast tomatoes turnips walnuts yogurt zucchini"
)
MONTHS = words(
    "January February March April May June July August September October November December"
)
GOODS = words(
    "amber bells bricks candles carpets clocks coal copper cotton glass gold iron lamps leather"
    " paper pearls"
)
RIVERS = words("Arden Bexa Cully Dorn Esker Feld")
MINERALS = words(
    "albine amarite arvenite basilite beldine borrite calvite cerine corvite dolnite drusine"
    " elmite ervine falsite feldrine fenrite galdine garvite gelmite halvine herrite ildine"
    " irvite jasmite jorine kalvite kerrine kolmite lanvite lorrine lumite maldine marvite"
    " mirine morrite nalvine norvite odrine olmite orvine paldite perrine polmite quarvite"
    " ravine rellite rodrine rusvite saldine sarvite serrine solmite talvite terrine tolmite"
    " ulvine umrite valdine vermite volrine walvite xelmite yarrine zolmite"
)  # one a color and shape
USES = words("beads chalk glue ink lenses magnets paint plaster polish salt soap tiles")
ADJECTIVES = words(
    "Ancient Bitter Bright Broken Burning Calm Clever Cold Crooked Crystal Dark Dusty Distant"
    " Empty Endless Faded Fallen First Floating Forgotten Frozen Gentle Golden Gray Hidden"
    " Hollow Humble Iron Last Little Lonely Lost Lucky Midnight Narrow Noble Painted Pale"
    " Patient Perfect Proud Quiet Restless Royal Sacred Secret Seventh Silent Silver Simple"
    " Sleeping Slow Stolen Strange Sunken Sweet Tall Thirsty Tiny Velvet Wandering White Wild"
    " Winter"
)
NOUNS = words(
    "Anchor Bear Bell Bird Boat Bridge Candle Castle Cave City Clock Coat Comet Crown Dancer"
    " Door Dream Eagle Engine Feather Field Fire Flag Forest Fountain Fox Garden Gate Giant"
    " Harbor Hill House Island Journey Key King Ladder Lake Lantern Letter Lion Map Mirror Moon"
    " Mountain Ocean Orchard Palace Path Planet Queen Rider River Road Rose Sailor Shadow Ship"
    " Song Star Storm Tower Valley Wolf"
)
GENRES = words(
    "ballad biography comedy diary fable history legend mystery poem romance satire tragedy"
)
NUMBERS = words("zero one two three four five six seven eight nine ten eleven twelve")
