"""The services of hearth.v1: what a call does, from its request to its last message.

    chosen_model   the model that a request names
    prompt         a conversation's token ids, as the policy has it
    chat           conversations
    model          which models there are, and how long a text is
    status         what the daemon is doing
    health         grpc.health.v1, for the daemon and each model
    convert        messages of the protocol to the engine's values and back
    tokenising     callers' texts, by turns
    statuses       the daemon's errors, and what status each becomes

A handler checks, asks the worker, and converts; what goes wrong it raises, and `statuses` answers. Nothing that a
person says to the model, and nothing that it answers, goes into the log. Called by gRPC; made by `life.parts`. Pairing
has a room of its own.
"""
