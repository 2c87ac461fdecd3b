"""Between models and arithmetic: read layers through an adapter, apply a numerical module, write them back.

One module per stage, named as its rule; nothing is gathered here, so that a change reruns the rules that use it alone.
"""
