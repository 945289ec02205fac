"""English words that `dfusion.prompts.items` needs to find the nouns of a prompt. All in lower case."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# words that begin a noun phrase

ARTICLES = _words("a an the this that these those my your his her its our their")
DETERMINERS = ARTICLES | _words(
    "some any every each no another both all many several few various multiple numerous one two three four five six "
    "seven eight nine ten eleven twelve dozen half"
)
SINGULAR_DETERMINERS = _words("a an this that each every one another")

# words that end a noun phrase

PREPOSITIONS = _words(
    "with without of in on at to from by for as into onto upon over under above below beneath underneath behind "
    "beside besides between among amongst amid amidst near nearby against across along alongside around about through "
    "throughout inside outside within atop off toward towards past beyond during before after since until despite via "
    "per like unlike than out aboard opposite"
)
CONNECTIVES = PREPOSITIONS | _words(
    "and or but nor so yet if because although though while when where who whose whom which what then there here it "
    "he she they him them you i we us me himself herself itself themselves someone something everything nothing up "
    "down left right next away apart together forward forwards backward backwards upward upwards downward downwards "
    "is are was were be been being am isn't aren't doesn't don't has have had do does did can could will would should "
    "may might must not too very also just still only even almost nearly quite again ever never always"
)
NEGATIONS = _words("without no missing lacking")
"""What follows is absent: "a classroom without students"."""

# verbs

_VERB_BASES = (
    "sit lie sleep eat hold carry wear read write catch throw chase climb bring get give take put keep make become "
    "seem appear contain depict say grow hang lean look stare gaze sing swim fly drive ride drink speak listen hear "
    "see watch wait pull push build destroy hide seek follow lead enjoy try want need use throw kick cook wash feed "
    "grab lift pour hug kiss chew bite lick sniff crash collide jump leap hop crawl wander gallop emerge arrive enter "
    "leave rest float stand smile laugh cry attack defend fight protect show tell teach learn play grapple deliver "
    "spell form fit include feature wave point face cross surround cover fill reflect glow shine burn melt walk run "
    "dance"
).split()
_NOUN_LIKE = _words(
    "hold catch throw look watch drink ride drive fly kick cook wash feed hug kiss bite lick crash jump leap hop rest "
    "float stand smile laugh cry attack fight show play spell form fit feature wave point face cross cover fill glow "
    "shine burn melt walk run dance lead leave need use lift pull push read stare lean"
)


def _third_person(base: str) -> str:
    if base.endswith(("s", "x", "z", "ch", "sh", "o")):
        return base + "es"
    return base[:-1] + "ies" if base.endswith("y") and base[-2] not in "aeou" else base + "s"


VERBS = frozenset(_third_person(base) for base in _VERB_BASES if base not in _NOUN_LIKE)
VERBS |= frozenset(base for base in _VERB_BASES if base not in _NOUN_LIKE) | _words(
    "sits stands rides runs jumps reads"
)
"""Verbs that are hardly used as nouns."""
NOUN_LIKE_VERBS = frozenset(_third_person(base) for base in _NOUN_LIKE)
"""Verbs after a singular noun, otherwise plural nouns: "a man watches the sea", "two gold watches"."""
NOUN_LIKE_BASES = _NOUN_LIKE
"""Verbs after a plural noun, otherwise nouns: "two dogs fight", "a fight"."""
SINGULAR_SUBJECTS = _words("that which who it he she")
PLURAL_SUBJECTS = _words("that which who they we you i to can will could would should must may might don't")
PARTICIPLES = _words(
    "seen made written held worn drawn built torn thrown grown shown known broken frozen stolen hidden woven hung "
    "caught bought brought sunken blown flown driven ridden eaten bitten beaten given taken shaken lost bound bent "
    "kept stuck dug done gone lit"
)

# adjectives

COLOURS = _words(
    "red orange yellow green blue purple violet pink brown black white grey gray beige turquoise cyan magenta golden "
    "silver gold teal crimson scarlet maroon navy lavender"
)
ADJECTIVES = COLOURS | _words(
    "big large small little tiny huge giant massive enormous gigantic miniature tall short long wide broad narrow "
    "thick thin slim skinny fat chubby old young new ancient modern antique vintage medieval futuristic wooden woolen "
    "woollen metallic metal plastic furry fluffy shiny bright dark light deep pale vivid colorful colourful beautiful "
    "pretty cute lovely ugly scary creepy spooky happy sad angry funny silly lonely calm proud brave fierce wild tame "
    "friendly round flat plain empty full open cold hot warm wet dry clean dirty dusty muddy heavy soft hard smooth "
    "rough sharp dull fast slow quick loud quiet busy crowded realistic photorealistic hyperrealistic surreal "
    "cinematic dramatic abstract minimalist majestic epic magical mystical real fake true whole half raw fresh ripe "
    "rotten sunny cloudy rainy snowy foggy misty stormy windy rusty grassy sandy rocky leafy hairy bald blond blonde "
    "high low many different similar same other own several alive dead asleep awake lush ornate elaborate "
    "intricate simple complex elegant fancy rich poor strong weak tired hungry thirsty sleepy sweet sour salty spicy "
    "crispy juicy transparent translucent opaque invisible visible famous royal holy sacred rural urban tropical "
    "arctic wavy curly straight best great good nice perfect curved upper lower"
)
NOUN_ADJECTIVES = _words("orange violet lavender light plastic metal silver gold antique miniature giant")
"""Adjectives that are nouns if nothing follows: "an orange on a plate"."""

# nouns that look like participles or adverbs

ING_NOUNS = _words(
    "building ceiling clothing railing awning earring string spring swing sling stocking wedding pudding dumpling "
    "duckling sibling sapling seedling hatchling lightning evening morning thing being viking icing frosting topping "
    "stuffing engraving etching carving scaffolding bedding gosling starling herring shoestring nightingale crossing"
)
ED_NOUNS = _words("flatbed seabed riverbed watershed bobsled moped quadruped")
LY_NOUNS = _words("jelly lily belly family doily holly bully trolley ally")

# nouns that name no thing to be masked

NEVER_ITEMS = _words(
    "style background foreground quality resolution detail details lighting masterpiece hd color colors colour "
    "colours size sizes shape shapes theme mood atmosphere vibe aesthetic concept effect texture perspective angle "
    "composition bokeh palette profile artstation deviantart unsplash pixiv pinterest behance time way love fun sense "
    "feeling amount"
)
MEDIA = _words(
    "photo photos photograph photographs photography picture pictures image images painting paintings watercolor "
    "watercolour drawing drawings illustration illustrations sketch sketches render rendering portrait portraits "
    "portrayal portrayals depiction woodcut engraving etching lithograph wash artwork art clipart snapshot cartoon "
    "anime view views shot shots scene closeup close-up still rendition representation selfie polaroid"
)
"""The image itself: "a photo of a cat", "anime illustration"."""
MATERIALS = _words("oil acrylic ink pencil charcoal chalk crayon pastel tempera gouache watercolor watercolour line")
PAINTED_WITH = MATERIALS | COLOURS | _words("digital surrealist abstract renaissance impressionist chinese japanese")
NOT_BEFORE_OF = _words(
    "front top bottom back side sides middle center centre edge group pair pairs bunch lot lots couple piece pieces "
    "slice slices kind type set series number part parts end shape form variety collection row rows dozen thousands "
    "hundreds style way view sort"
)
"""Words that are no items before "of": "on top of a car", "a pair of shoes"."""
POSITIONS = _words("top bottom side sides middle center centre front rear corner corners edge distance end ends")
"""Words that are no items on their own after a preposition: "at the top"."""
TIMES = _words(
    "day days night sunrise sunset dawn dusk noon midday midnight morning evening afternoon twilight daytime "
    "nighttime spring summer autumn winter season century year years hour hours moment"
)
"""Items only if the prompt names nothing else: "a sunset"."""
WRITING = _words("word words text caption")
"""Items only if the prompt names nothing else: "a shop with the word OPEN over its door"."""
SURROUNDING = _words("in on at across through throughout along into amid around inside within against")
SCENERY = _words(
    "beach street road highway forest jungle field fields meadow sky ocean sea desert city town village park room "
    "kitchen bedroom bathroom classroom office background landscape countryside mountains valley ground grass floor "
    "air sand snow rain fog mist storm snowstorm wilderness woods yard backyard garden outdoors indoors space"
)
"""Places that fill the image, of which a mask has no use. After a preposition of SURROUNDING they are items only if the
prompt names nothing else."""
