"""Who runs, and how much at a time: the policy, without a model. The map is docs/scheduling.md.

Knows sequences; no tokens' meaning, no KV, no threads. Called by `engine`, which does what is chosen here.
"""
