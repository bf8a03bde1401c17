"""Plain English words for needle keys and word lists: fixed here so that prompts are the same on every machine."""

NOUNS: tuple[str, ...] = tuple(
    """
    acorn airport alley almond anchor angle ankle anthem apple apron arch arena armor arrow atlas attic
    avenue axle badge bagel bakery balcony bamboo banana banjo banner barley barn barrel basil basket battery
    beach beacon bean beaver bedroom beetle bell bench berry bicycle biscuit blanket blossom boat bonnet bottle
    boulder bowl bracelet branch bread breeze brick bridge broom brush bucket buckle budget buffalo bugle bullet
    bundle burrow butter button cabbage cabin cable cactus camel camera canal candle canoe canvas canyon captain
    carbon cargo carpet carrot castle cattle cavern cedar ceiling cellar cement century chair chalk channel chapel
    chapter cherry chest chimney cider cinema circle circus clarinet climate clock cloud clover cobbler coconut
    coffee collar comet compass concert copper coral corner cottage cotton cougar couple cousin coyote cradle
    crater crayon cricket crystal cupboard curtain cushion cymbal dagger dairy daisy dancer decade desert diamond
    dinner dolphin donkey dragon drawer drum eagle easel echo elbow elevator ember engine envelope errand estate
    evening fabric factory falcon farmer feather fence ferry fiddle field finger flagpole flame flannel flower
    flute forest fortune fossil fountain freight frost funnel furnace galaxy garage garden garlic garment gate
    gazelle geyser ginger giraffe glacier goblet gorilla granite grape gravel grocer guitar gutter hammer hammock
    harbor harvest hazel hedge helmet herald heron highway hinge holiday honey horizon hornet hospital hotel
    hunter iceberg igloo insect island ivory jacket jaguar jelly jersey jewel jigsaw journey jungle kayak kennel
    kernel kettle kingdom kitchen kite kitten ladder lagoon lantern laundry leather lemon leopard letter lettuce
    library lighthouse lilac linen lizard lobster locket lumber magnet mansion maple marble margin market meadow
    medal melody melon merchant meteor midnight mineral mirror mitten molecule monarch monkey monsoon morning
    mosaic mountain muffin museum mushroom mustard napkin narrator nectar needle nickel notebook nutmeg oasis
    oatmeal ocean octopus olive onion orbit orchard orchid organ otter oven oyster paddle palace pancake panther
    papaya parade parcel parrot parsley pasture patch pavement peach peanut pebble pelican pencil penguin pepper
    piano pickle picnic pigeon pillow pilot pioneer pirate planet plaster plaza plum pocket poet pond poplar
    porch portrait potato pottery prairie printer prism proverb pudding puddle pulley pumpkin puppet puzzle
    quarry quilt rabbit raccoon radar radish railway rainbow ranch raven reactor recipe refuge ribbon riddle
    river robin rocket rooster rudder saddle safari sailor salmon sandal satchel saucer scarf school scooter
    sculptor seagull season seed shadow shelter sheriff shovel shrine shuttle sierra signal silver singer sketch
    skillet slipper snail soldier sonnet sparrow spider spinach spiral spruce squirrel stable stadium statue
    steeple stencil stocking storm stove strand stream student summit sunrise surgeon sweater symbol syrup table
    tailor talent tapestry teacher temple tennis terrace theater thicket thimble thistle throne thunder ticket
    timber tomato topaz torch tornado tower tractor trail trumpet tulip tundra tunnel turbine turkey turnip turtle
    umbrella uncle uniform valley vanilla vault velvet vendor violin vision volcano voyage waffle wagon walnut
    walrus warehouse weasel wedding whisper whistle widow willow window winter wizard wombat workshop yogurt zebra
    zipper
    """.split()
)

ADJECTIVES: tuple[str, ...] = tuple(
    """
    able absent active adept agile alert amber ancient annual arctic arid ashen atomic autumn aware awful azure
    balmy bare basic bitter blank bleak blind blond blue blunt bold bony boring brave brief bright brisk broad
    broken bronze brown bumpy busy calm candid careful casual central certain charming cheap cheerful chief chilly
    civil classic clean clear clever clumsy coarse cold common compact complex cool cosmic cosy crafty crimson
    crisp crooked crowded cruel curious curly daily damp dapper dark daring dear decent deep delicate dense dim
    direct distant dizzy double drowsy dry dull dusty eager early earnest eastern easy elastic elderly elegant
    empty endless equal even exact exotic fair faint faithful false famous fancy fast fearless fertile festive
    fierce final fine firm flat fleet flimsy fluffy fond formal fragile frail free fresh friendly frosty frozen
    full funny fuzzy gaudy gentle genuine giant gifted glad gleaming global gloomy glossy golden good graceful
    grand grateful grave greedy green grim gritty grumpy guilty handsome handy happy hardy harsh hasty healthy
    heavy helpful hidden hollow homely honest hopeful huge humble humid hungry icy ideal idle immense inner
    innocent jolly jovial joyful keen kind large late lavish lazy lean legal level light likely limber little
    lively local lofty lonely long loose loud lovely loyal lucky mad magenta main major meek mellow merry mighty
    mild minor misty modern modest moody narrow nasty native neat nervous nimble noble noisy normal northern novel
    obedient oblong odd official old open orange ordinary ornate oval pale parallel past patient peaceful perfect
    pink plain playful pleasant plump polite poor popular precious pretty primal private prompt proper proud
    public pure purple quaint queer quick quiet rapid rare raw ready real recent regal regular remote rich rigid
    ripe robust romantic rosy rough round royal rural rustic sacred safe salty sandy scarce scarlet secret serene
    serious severe shaggy shallow sharp shiny short shy silent silky silly simple sincere skilled sleek sleepy
    slender slim slow small smart smooth snowy sober social soft solar solid sombre sour southern spare special
    spicy splendid stale stark steady steep stern sticky stiff still stormy stout strange strict strong sturdy
    subtle sudden sunny superb sweet swift tall tame tart tender tense thick thin thirsty tidy tight tiny tired
    total tough tranquil tricky tropical true typical ugly unique upper urban useful usual vacant vague valid vast
    vital vivid warm wary weak wealthy weary western wet white whole wicked wide wild wise witty wooden worthy
    yellow young zealous
    """.split()
)
