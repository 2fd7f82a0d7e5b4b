"""English words that invented worlds are furnished with; none is a held-out attribute."""

KINDS = (
    *(("river", "rivers"), ("ship", "ships"), ("planet", "planets"), ("company", "companies")),
    *(("book", "books"), ("team", "teams"), ("island", "islands"), ("mountain", "mountains")),
    *(("bridge", "bridges"), ("museum", "museums"), ("airport", "airports"), ("moon", "moons")),
    *(("school", "schools"), ("castle", "castles"), ("dam", "dams"), ("lake", "lakes")),
    *(("mineral", "minerals"), ("bird", "birds"), ("film", "films"), ("engine", "engines")),
    *(("village", "villages"), ("station", "stations"), ("region", "regions"), ("port", "ports")),
    *(("person", "people"), ("artist", "artists"), ("language", "languages"), ("drug", "drugs")),
    *(("star", "stars"), ("robot", "robots"), ("bank", "banks"), ("temple", "temples")),
    *(("country", "countries"), ("city", "cities"), ("tower", "towers"), ("tree", "trees")),
)
"""(kind, its plural)."""

ATTRIBUTES = (
    *(("length", "large"), ("height", "large"), ("width", "decimal"), ("depth", "count")),
    *(("mass", "decimal"), ("weight", "large"), ("speed", "count"), ("price", "decimal")),
    *(("age", "count"), ("volume", "large"), ("power", "large"), ("range", "large")),
    *(("temperature", "decimal"), ("pressure", "decimal"), ("revenue", "large")),
    *(("population", "large"), ("area", "large"), ("density", "decimal"), ("score", "decimal")),
    *(("members", "count"), ("students", "count"), ("visitors", "large"), ("seats", "count")),
    *(("pages", "count"), ("floors", "count"), ("elevation", "large"), ("budget", "large")),
    *(("distance", "decimal"), ("period", "decimal"), ("radius", "decimal"), ("rank", "digit")),
    *(("founded", "year"), ("built", "year"), ("opened", "year"), ("year", "year")),
    *(("first seen", "year"), ("renamed", "year"), ("launch year", "year")),
    *(("colour", "word"), ("material", "word"), ("status", "word"), ("genre", "word")),
    *(("type", "phrase"), ("style", "phrase"), ("category", "phrase"), ("motto", "phrase")),
    *(("climate", "word"), ("shape", "word"), ("class", "letter"), ("block", "letter")),
    *(("code", "code"), ("symbol", "code"), ("call sign", "code"), ("short name", "code")),
    *(("postal code", "digits"), ("serial number", "digits"), ("area code", "digits")),
    *(("registry number", "digits"), ("catalog number", "mixed"), ("licence", "mixed")),
    *(("model", "mixed"), ("grade", "mixed"), ("domain", "domain"), ("web site", "domain")),
    *(("author", "name"), ("director", "name"), ("architect", "name"), ("mayor", "name")),
    *(("president", "name"), ("discoverer", "name"), ("designer", "name"), ("patron", "name")),
    *(("currency", "name"), ("brand", "name"), ("nickname", "name"), ("local name", "name")),
    *(("language", "name"), ("family", "name"), ("continent", "name"), ("province", "name")),
    *(("latitude", "degrees"), ("longitude", "degrees"), ("time zone", "path")),
    *(("products", "names"), ("partners", "names"), ("neighbours", "names")),
    *(("languages", "codes"), ("gauges", "codes")),
)
"""(attribute, what its values look like)."""

RELATION_NAMES = (
    *("owner", "home port", "parent", "capital", "country", "largest city", "nearest city"),
    *("twin", "successor", "predecessor", "rival", "origin", "destination", "headquarters"),
    *("source", "mouth", "neighbour", "main supplier", "birthplace", "sponsor", "county seat"),
    *("next element", "element below", "next stop", "mother ship", "main export", "largest port"),
)
"""Attributes whose value is the title of another page."""

COMMON_WORDS = (
    *("red", "green", "blue", "white", "black", "golden", "silver", "amber", "violet", "grey"),
    *("iron", "stone", "timber", "glass", "granite", "copper", "marble", "brick", "steel"),
    *("active", "closed", "planned", "retired", "rare", "common", "stable", "tropical", "dry"),
    *("humid", "cold", "mild", "alpine", "modern", "gothic", "classic", "light", "heavy"),
    *("round", "square", "oval", "open", "northern", "southern", "eastern", "western", "early"),
    *("late", "metals", "gases", "transition", "noble", "alkali", "poor", "strong", "quiet"),
)

CONNECTORS = ("de", "of", "the", "al", "la", "von", "di", "upon", "and", "del", "y", "du")

PREFIXES = ("San", "New", "Saint", "North", "South", "East", "Great", "Port", "El", "Fort", "Upper")

SUFFIXES = ("City", "Island", "Bay", "Valley", "Hills", "Point", "Town", "Beach", "Park", "Islands")
