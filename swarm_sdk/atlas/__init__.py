"""The Atlas: real facts, questions with exact answers, and scripted ways to answer them.

build  -> atlas.json.gz      facts of GeoNames and mendeleev, one page an entity
pages, invent -> World       real pages, or a small world of invented ones
questions, pictures          what is asked of a world, and the exact answer
policies                     scripted agents that answer through the real runtime and tools
scoring                      how right an answer is
"""
