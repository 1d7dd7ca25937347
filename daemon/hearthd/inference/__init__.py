"""An inference thread, what it serves, and the hand-off to asyncio."""
