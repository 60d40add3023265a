"""The command ``hf-multimax``: look at models, patch, publish and convert them without writing code.

``main.py`` is the entry, ``app.py`` names the commands, which are in ``checkpoints.py``, ``looking.py``,
``drawing.py``, ``machine.py`` and ``demo.py``; they load by ``loading.py`` and ``data.py``, and write by ``screen.py``.
"""
