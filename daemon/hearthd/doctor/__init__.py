"""`hearthd doctor`: what is wrong with the machine, the installation or the running daemon, and what helps."""
