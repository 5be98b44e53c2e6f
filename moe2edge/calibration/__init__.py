"""From texts to facts about a model.

Texts and mixes, tokens, text that the model writes itself, the walk that streams them through a
model block by block, the observers that gather statistics on the way, and the criteria by which
experts are scored. Imports runtime and below; passes and every room above may come in, targets may
not.
"""
