"""The servers that ``tools/bench.py`` measures this one against, and how each is started."""
