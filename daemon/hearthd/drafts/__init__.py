"""Drafts: guess what comes next from what was said before, and run the guess in one go with the last token.

`repeats` finds the guess, `drafter` says how much of it is worth a run, `run_costs` knows what a run costs, `exactness`
tries once, at load, whether this processor gives a guess that is run at once the bits of single steps. docs/drafts.md.
"""
