"""The models that a daemon serves: which there are, which of them are loaded, and when they go.

    pool      all of them: who asks for one gets it loaded, and has it for as long as it is needed
    residents those in memory: how one comes, who makes room for it, how one goes
    entry     one of them: its state, its inference thread, who uses it
    facts     what a bundle says of itself before it is loaded, the memory that it will take above all
    room      who leaves when there is not enough memory for all
    bell      something has changed: look again

Called by `server` and `services`.
"""
