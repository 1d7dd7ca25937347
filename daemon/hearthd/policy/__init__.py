"""The policy file: instructions that callers cannot remove, and phrases that are blocked or required.

    policy_file.py   the file: read, checked, read again
    rules.py         what it says, as values
    screening.py     what a rule does to a text: refuse, stop, replace, append
    search.py        where phrases stand in a text that comes in pieces: one pass, no backtracking
    phrases.py       phrases as one automaton for all
    folding.py       characters as they are compared: case, width and composition do not matter

Imports run upwards in this list. Called by `services` (conversations) and `answer` (what the model writes).
"""
