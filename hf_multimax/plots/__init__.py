"""Figures of modulators, scores, measures and attention maps. They need matplotlib (``hf-multimax[plots]``).

Each function returns the matplotlib figure and takes a ``path`` to save it at; PNG and SVG by its ending.
"""

from hf_multimax.plots.curves import plot_training
from hf_multimax.plots.maps import plot_image_maps, plot_text_maps
from hf_multimax.plots.measures import plot_measures
from hf_multimax.plots.modulators import plot_modulators, plot_modulators_on_scores, plot_normalizer
from hf_multimax.plots.simplex import plot_simplex
from hf_multimax.plots.style import save

__all__ = [
    "plot_image_maps",
    "plot_measures",
    "plot_modulators",
    "plot_modulators_on_scores",
    "plot_normalizer",
    "plot_simplex",
    "plot_text_maps",
    "plot_training",
    "save",
]
