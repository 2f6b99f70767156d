"""What does a model say? From a run, an export or the hub (`origin`), token by token (`speaker`), in turns
(`turns`), to a person (`__main__`) or to a script (`generate`).
"""
