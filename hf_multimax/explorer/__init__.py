"""The explorer: look at one attention row in a browser, and move its scalars.

``looks.py`` computes, ``pictures.py`` draws what was computed as HTML, ``page.py`` (with ``page.css``) lays it out, and
``app.py`` serves it: here, for ``hf-multimax explore``, or as a Space.
"""
