"""The word lists of `mini-text`; each fact in them was written for this project."""

from __future__ import annotations

from typing import NamedTuple

Item = tuple[str, ...]  # the asked word first, then its facts


class Family(NamedTuple):
    """Questions of one skill: `rule` names the function of `text.RULES` that writes them."""

    subject: str
    topic: str
    category: str
    skill: str
    grades: tuple[int, int]  # lowest, highest
    items: list[Item]
    rule: str
    templates: tuple[str, ...]


def _items(table: str) -> list[Item]:
    """Items of "word:fact:fact word:fact:fact"; an underscore stands for a space."""
    return [tuple(f.replace("_", " ") for f in row.split(":")) for row in table.split()]


def _labelled(**groups: str) -> list[Item]:
    """(word, label) of every word of every group."""
    return [
        (word.replace("_", " "), label) for label, words in groups.items() for word in words.split()
    ]


ANIMALS = _labelled(
    mammal="dog horse whale lion rabbit elephant monkey bear mouse kangaroo dolphin sheep tiger"
    " squirrel wolf bat giraffe deer goat camel",
    bird="eagle penguin owl duck parrot swan ostrich crow robin pigeon hawk sparrow flamingo"
    " turkey peacock goose pelican woodpecker",
    fish="salmon tuna shark trout goldfish seahorse cod eel carp herring piranha swordfish"
    " stingray sardine",
    reptile="snake lizard crocodile turtle alligator gecko iguana tortoise chameleon python"
    " rattlesnake cobra",
    insect="ant bee butterfly beetle mosquito grasshopper ladybug dragonfly moth cricket wasp"
    " termite housefly cockroach",
    amphibian="frog toad salamander newt tadpole bullfrog tree_frog axolotl poison_dart_frog",
)
STATES = _labelled(
    solid="a_rock a_spoon a_brick ice a_coin a_pencil a_hammer a_key wood a_plate gold a_bone"
    " a_button a_chair a_marble a_nail chalk a_ring",
    liquid="milk rain orange_juice olive_oil vinegar honey tea gasoline lemonade ink shampoo"
    " coffee sea_water cough_syrup melted_butter soy_sauce apple_cider blood",
    gas="oxygen helium steam carbon_dioxide nitrogen the_air_in_a_balloon the_air_in_a_tire"
    " natural_gas hydrogen neon water_vapor the_air_inside_a_bubble",
)
SIZES = _items(  # what is measured, number, right unit, other units of the same kind
    "length_of_a_pencil:17:centimeters:kilometers:meters length_of_a_school_bus:12:meters:"
    "millimeters:kilometers length_of_an_ant:5:millimeters:meters:kilometers height_of_a_door:2:"
    "meters:millimeters:kilometers distance_between_two_cities:90:kilometers:centimeters:meters "
    "length_of_a_spoon:15:centimeters:meters:kilometers width_of_a_soccer_field:60:meters:"
    "centimeters:kilometers length_of_a_long_river:800:kilometers:meters:centimeters "
    "thickness_of_a_coin:2:millimeters:meters:kilometers height_of_a_tall_tree:30:meters:"
    "centimeters:kilometers length_of_a_shoe:25:centimeters:meters:kilometers "
    "distance_of_a_marathon:42:kilometers:meters:centimeters mass_of_a_paper_clip:1:gram:kilogram "
    "mass_of_a_bicycle:12:kilograms:grams mass_of_a_grape:5:grams:kilograms mass_of_a_sofa:50:"
    "kilograms:grams mass_of_a_feather:1:gram:kilogram mass_of_a_grown_man:80:kilograms:grams "
    "mass_of_an_egg:55:grams:kilograms mass_of_a_refrigerator:90:kilograms:grams mass_of_a_cow:600:"
    "kilograms:grams mass_of_a_slice_of_bread:30:grams:kilograms volume_of_a_bathtub:200:liters:"
    "milliliters volume_of_a_teaspoon:5:milliliters:liters volume_of_a_kitchen_sink:20:liters:"
    "milliliters volume_of_a_drop_of_rain:1:milliliter:liter volume_of_a_bucket:9:liters:"
    "milliliters volume_of_a_coffee_mug:300:milliliters:liters volume_of_a_fish_tank:75:liters:"
    "milliliters volume_of_a_bottle_of_ink:40:milliliters:liters time_to_blink_twice:1:second:hour:"
    "day time_to_brush_your_teeth:3:minutes:hours:days time_to_sleep_at_night:9:hours:seconds:"
    "minutes time_to_boil_an_egg:8:minutes:hours:seconds time_to_tie_a_shoe:15:seconds:hours:days "
    "time_to_grow_a_tomato_plant:80:days:minutes:seconds time_to_watch_a_movie:2:hours:seconds:"
    "minutes time_to_sneeze:2:seconds:hours:days time_to_eat_lunch:25:minutes:seconds:days "
    "time_to_heal_a_broken_arm:45:days:seconds:minutes"
)
MATTER = _labelled(
    glass="window_pane light_bulb jam_jar mirror test_tube wine_bottle fish_bowl camera_lens",
    wood="tree_house log_cabin pencil broomstick picnic_table canoe_paddle bookshelf barn_door",
    metal="nail paper_clip frying_pan key coin hammer_head railroad_track trumpet soup_can",
    wool="winter_scarf sweater mitten knitted_hat thick_blanket warm_sock",
    paper="newspaper envelope notebook_page greeting_card book_cover train_ticket poster",
    rubber="car_tire eraser rain_boot bouncy_ball bicycle_tire garden_hose",
)
COUNTRIES = _items(
    "France:Paris:Europe Spain:Madrid:Europe Italy:Rome:Europe Germany:Berlin:Europe Greece:Athens:"
    "Europe Poland:Warsaw:Europe Portugal:Lisbon:Europe Norway:Oslo:Europe Sweden:Stockholm:Europe "
    "Austria:Vienna:Europe Ireland:Dublin:Europe Hungary:Budapest:Europe Finland:Helsinki:Europe "
    "Belgium:Brussels:Europe Denmark:Copenhagen:Europe Romania:Bucharest:Europe Japan:Tokyo:Asia "
    "China:Beijing:Asia India:New_Delhi:Asia Thailand:Bangkok:Asia Vietnam:Hanoi:Asia Iraq:Baghdad:"
    "Asia Nepal:Kathmandu:Asia South_Korea:Seoul:Asia Iran:Tehran:Asia Mongolia:Ulaanbaatar:Asia "
    "Pakistan:Islamabad:Asia Lebanon:Beirut:Asia Saudi_Arabia:Riyadh:Asia Afghanistan:Kabul:Asia "
    "Egypt:Cairo:Africa Kenya:Nairobi:Africa Ghana:Accra:Africa Ethiopia:Addis_Ababa:Africa "
    "Senegal:Dakar:Africa Uganda:Kampala:Africa Morocco:Rabat:Africa Libya:Tripoli:Africa Angola:"
    "Luanda:Africa Zambia:Lusaka:Africa Zimbabwe:Harare:Africa Somalia:Mogadishu:Africa Brazil:"
    "Brasilia:South_America Peru:Lima:South_America Chile:Santiago:South_America Argentina:"
    "Buenos_Aires:South_America Colombia:Bogota:South_America Ecuador:Quito:South_America Uruguay:"
    "Montevideo:South_America Venezuela:Caracas:South_America Paraguay:Asuncion:South_America "
    "Canada:Ottawa:North_America Mexico:Mexico_City:North_America Cuba:Havana:North_America "
    "Jamaica:Kingston:North_America Costa_Rica:San_Jose:North_America "
    "Honduras:Tegucigalpa:North_America "
    "Panama:Panama_City:North_America Nicaragua:Managua:North_America Haiti:"
    "Port-au-Prince:North_America"
)
TRADED = _labelled(
    good="a_bicycle a_loaf_of_bread a_pair_of_boots a_lamp a_guitar a_jacket a_kite a_backpack"
    " a_bag_of_apples a_tent a_watch a_skateboard a_wooden_desk a_toaster a_puzzle a_raincoat"
    " a_sandwich a_telescope a_basketball a_box_of_crayons a_teapot a_pillow a_jar_of_jam a_drum",
    service="a_haircut a_piano_lesson a_car_wash a_taxi_ride a_dental_checkup a_swimming_lesson"
    " babysitting dog_walking lawn_mowing house_painting window_cleaning mail_delivery a_bus_ride"
    " a_doctor's_visit trash_pickup a_guided_tour carpet_cleaning a_roof_repair a_cooking_class"
    " snow_shoveling a_massage a_math_tutoring_session pet_grooming a_bike_repair",
)
JOBS = _items(
    "baker:bakes_bread doctor:treats_sick_people farmer:grows_crops firefighter:puts_out_fires "
    "pilot:flies_airplanes dentist:takes_care_of_teeth plumber:fixes_water_pipes "
    "tailor:sews_clothes librarian:lends_books barber:cuts_hair carpenter:builds_with_wood "
    "judge:decides_court_cases "
    "mayor:leads_a_city author:writes_stories butcher:sells_meat astronaut:travels_into_space "
    "teacher:helps_students_learn gardener:takes_care_of_plants sailor:works_on_a_ship "
    "veterinarian:treats_sick_animals mechanic:repairs_cars waiter:serves_meals "
    "florist:sells_flowers photographer:takes_pictures miner:digs_for_coal_or_ore "
    "cashier:takes_payments_at_a_store lifeguard:watches_over_swimmers electrician:fixes_wiring "
    "senator:makes_laws shepherd:looks_after_sheep optician:makes_eyeglasses fisher:catches_fish "
    "composer:writes_music referee:enforces_the_rules_of_a_game potter:makes_clay_bowls "
    "beekeeper:collects_honey"
)
WORDS = _labelled(
    noun="kitchen teacher mountain bottle sister village garden pencil hospital elbow window"
    " kitten island lemon uncle carrot blanket doctor ocean ladder castle dentist meadow basket"
    " closet jungle saddle wagon",
    verb="bring forget arrive explain decide choose sing write teach listen follow remember"
    " destroy agree believe borrow compare describe enjoy gather invite obey receive repeat"
    " swallow vanish weep chew",
    adjective="happy enormous purple lazy gentle noisy brave hungry clever dusty famous fragile"
    " curious sleepy delicious nervous ancient polite salty wooden jealous shiny fuzzy careful"
    " angry silly muddy crunchy",
    adverb="quickly softly always carefully bravely happily rarely politely sadly slowly never"
    " loudly eagerly honestly calmly neatly gladly suddenly gracefully often",
)
OPPOSITES = _items(
    "hot:cold fast:slow early:late open:closed full:empty wet:dry heavy:light hard:soft"
    " rough:smooth young:old tall:short day:night above:below inside:outside win:lose "
    "push:pull buy:sell"
    " laugh:cry love:hate rich:poor strong:weak deep:shallow thick:thin wide:narrow bright:dim"
    " clean:dirty sharp:dull sweet:sour true:false left:right begin:end give:take"
    " arrive:leave remember:forget float:sink friend:enemy war:peace asleep:awake"
    " ancient:modern brave:cowardly generous:selfish guilty:innocent noisy:quiet increase:decrease"
    " accept:refuse success:failure attack:defend freeze:melt straight:crooked"
    " public:private simple:complicated"
)
PLURALS = _items(
    "child:children foot:feet tooth:teeth mouse:mice goose:geese man:men woman:women ox:oxen"
    " leaf:leaves knife:knives wolf:wolves shelf:shelves loaf:loaves half:halves calf:calves"
    " thief:thieves wife:wives city:cities baby:babies puppy:puppies berry:berries"
    " lady:ladies party:parties story:stories cherry:cherries family:families pony:ponies"
    " penny:pennies box:boxes fox:foxes bus:buses dish:dishes brush:brushes peach:peaches"
    " lunch:lunches glass:glasses watch:watches church:churches dress:dresses bench:benches"
    " tax:taxes potato:potatoes tomato:tomatoes hero:heroes toy:toys key:keys"
    " monkey:monkeys valley:valleys turkey:turkeys piano:pianos"
)
VERBS = _items(
    "bake:baked:a_cake visit:visited:the_museum paint:painted:the_fence wash:washed:the_car "
    "build:built:a_tower catch:caught:the_ball drink:drank:some_milk eat:ate:the_soup "
    "find:found:a_shell fly:flew:a_kite buy:bought:a_book sing:sang:a_song write:wrote:a_letter "
    "ride:rode:a_horse break:broke:the_vase draw:drew:a_map teach:taught:a_class "
    "win:won:the_game sell:sold:the_boat bring:brought:a_gift throw:threw:a_stone "
    "hide:hid:the_key choose:chose:a_color steal:stole:the_pie feed:fed:the_birds "
    "wear:wore:a_hat tell:told:a_joke climb:climbed:the_hill open:opened:the_gate "
    "carry:carried:the_bags study:studied:the_stars watch:watched:a_movie plant:planted:a_tree "
    "cook:cooked:dinner clean:cleaned:the_attic fix:fixed:the_clock chase:chased:the_cat "
    "pick:picked:some_berries pull:pulled:the_rope kick:kicked:the_can cross:crossed:the_bridge "
    "borrow:borrowed:a_pen drop:dropped:the_tray enjoy:enjoyed:the_show hear:heard:a_noise "
    "keep:kept:a_secret lose:lost:a_glove make:made:a_mask meet:met:a_friend "
    "see:saw:a_rainbow grow:grew:some_beans shake:shook:the_jar"
)
HIDDEN = _items(
    "kite trumpet lantern compass umbrella notebook whistle mitten teapot camera necklace"
    " hammer suitcase violin thermos helmet flashlight wallet scarf paintbrush puzzle bracelet"
    " skateboard yo-yo globe blanket drum magnet slipper ribbon shovel candle basket ukulele"
    " telescope harmonica"
)
FOODS = ("grass", "seeds", "fish", "insects", "leaves", "berries", "crabs", "roots", "nuts")
PLACES = ("kitchen", "garden", "attic", "garage", "library", "bedroom", "basement", "barn")
NAMES = ("Maya", "Owen", "Lena", "Tariq", "Rosa", "Felix", "Aiko", "Jonas", "Priya", "Caleb")
WHO = ("My parents", "The twins", "Our neighbors", "The children", "Two old friends", "The players")
GUIDES = [  # words of this dictionary's page heads
    guide
    for (guide,) in _items(
        "acorn bandit beaver cabin candle chimney comet dagger diamond dragon eclipse fable"
        " feather fossil galaxy ginger harbor helmet igloo jacket kettle lagoon lemonade magnet"
        " marble nectar oyster paddle pebble pocket quilt ribbon rocket sandal shelter signal"
        " statue tailor thunder turnip umbrella velvet walnut willow yogurt"
    )
]

_TABLES: dict[str, list[Item]] = {
    "animals": ANIMALS,
    "states": STATES,
    "matter": MATTER,
    "continents": [(c, where) for c, _, where in COUNTRIES],
    "traded": TRADED,
    "words": WORDS,
    "capitals": [(c, capital) for c, capital, _ in COUNTRIES],
    "jobs": JOBS,
    "opposites": OPPOSITES,
    "sizes": SIZES,
    "goods": [(x, kind) for x, kind in TRADED if kind == "good"],
    "plurals": PLURALS,
    "verbs": VERBS,
    "hidden": HIDDEN,
}
# A family is two lines: subject, topic, category, skill, grades, table, rule; then its templates.
# Families with labels come first: `text._deal` then splits every label evenly.
_FAMILIES = """\
natural | biology | Classification | Classify animals | 2-6 | animals | label
What kind of animal is {ax}? | Which of these animals is {alabel}?
natural | chemistry | States of matter | Name the state of matter | 2-5 | states | label
Which state of matter is {x}? | Which of these is {alabel}?
natural | materials | Properties of materials | Name the material | 1-4 | matter | label
What is {ax} usually made of? | Which of these is usually made of {label}?
social | geography | Continents | Find the continent of a country | 4-9 | continents | label
On which continent is {x}? | Which of these countries is in {label}?
social | economics | Goods and services | Tell goods from services | 2-4 | traded | label
Is this a good or a service: {x}? | Which of these is {alabel}?
language | grammar | Word classes | Name the class of a word | 3-8 | words | label
Which part of speech is the word "{x}"? | Which of these words is {alabel}?
social | geography | Capitals | Know capital cities | 5-12 | capitals | fact
What is the capital of {x}? | {fact} is the capital of which country?
social | civics | Community | Know what people do at work | 1-4 | jobs | fact
What does {ax} do at work? | Which worker usually {fact}?
language | vocabulary | Antonyms | Find the opposite | 2-6 | opposites | fact
Which word means the opposite of "{x}"? | Which word means the opposite of "{fact}"?
natural | units-and-measurement | Metric units | Choose the best estimate | 3-8 | sizes | size
What is the best estimate for the {x}? | About how much is the {x}?
natural | literacy-in-science | Animal stories | Read about what animals eat | 1-3 | animals | meal
What does the {x} eat in the morning? | What does the {x} eat at night?
social | economics | Trade | Follow a trade | 2-5 | goods | trade
What does {a} get in exchange for {x}? | What will {b} give {a} for {x}?
language | spelling | Plurals | Form the plural | 2-5 | plurals | plural
What is the plural of "{x}"? | Which word means more than one {x}?
language | verbs | Past tense | Form the past tense | 2-6 | verbs | past
What is the past tense of the verb "{x}"? | Complete it: "Yesterday {who} ___ {rest}."
language | verbs | Tenses | Name the tense of a sentence | 2-6 | verbs | tense
past | present | future | pick past | pick present | pick future
language | grammar | Sentences and fragments | Find the complete sentence | 3-9 | verbs | fragment
Which of these is a complete sentence? | Which of these is a sentence fragment?
language | reference-skills | Guide words | Use guide words | 2-7 | words | guide
Guide words "{low}" and "{high}": what fits? | Which word lies between "{low}" and "{high}"?
language | reading-comprehension | Short stories | Find a detail | 1-4 | hidden | story
Where did {a} put the {x}? | Where is the {x} now?
"""


def _family(head: str, templates: str) -> Family:
    subject, topic, category, skill, grades, table, rule = head.split(" | ")
    low, high = grades.split("-")
    about = (f"{subject} science", topic, category, skill, (int(low), int(high)))
    return Family(*about, _TABLES[table], rule, tuple(templates.split(" | ")))


_LINES = _FAMILIES.splitlines()
FAMILIES = [_family(*pair) for pair in zip(_LINES[::2], _LINES[1::2], strict=True)]
