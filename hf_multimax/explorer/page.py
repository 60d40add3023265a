"""The page: what can be chosen, and the panels that follow. What they show is computed in ``looks.py``."""

import importlib.resources
import os
from collections.abc import Callable, Mapping
from typing import Any

from hf_multimax.command_line.words import one_line, read_options
from hf_multimax.explorer import pictures
from hf_multimax.explorer.looks import AS_TRAINED, DIGITS, Choice, Explorer, Inputs, Look
from hf_multimax.plots.style import short_names

__all__ = ["build", "gradio", "look_of_page"]

#: What a user can get wrong; each is a line on the page.
_ERRORS = (OSError, ValueError, TypeError, RuntimeError, ImportError, NotImplementedError)
_PANELS = (pictures.sigma, pictures.measures, pictures.row, pictures.maps, pictures.output)


def gradio() -> Any:
    """The package, told to send nothing home; raises ImportError, naming the extra, without it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError as error:
        raise ImportError("the explorer needs Gradio: pip install 'hf-multimax[app]'") from error
    return gr


def build(explorer: Explorer, start: Inputs) -> Any:
    """The explorer of one model as Gradio's ``Blocks``, to be served by ``launch(**look_of_page())``.

    Args:
        start: what is looked at first; of a model of images it may be without one.

    Raises:
        ImportError: without Gradio. ValueError: if the model cannot be run on ``start``.
    """
    return _Page(gradio(), explorer, start).blocks


def look_of_page() -> dict[str, Any]:
    """Arguments of Gradio's ``launch``: colours and fonts, of which nothing is fetched from elsewhere."""
    gr = gradio()
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    css = importlib.resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    theme = gr.themes.Default(primary_hue="orange", **fonts)
    return {"css": css, "theme": theme, "footer_links": [], "ssr_mode": False, "pwa": False}


class _Page:
    """The components, and what happens when one is moved: a method takes all values, and gives those that change."""

    def __init__(self, gr: Any, explorer: Explorer, start: Inputs) -> None:
        self._gr, self._explorer = gr, explorer
        loaded = explorer.loaded
        layer = explorer.layers[0]
        look = None if loaded.takes_images and start.image is None else explorer.look(start, layer)
        title = f"{loaded.class_name}, {os.path.basename(loaded.path.rstrip('/'))}"
        with gr.Blocks(title=title, analytics_enabled=False) as self.blocks:
            gr.Markdown(f"## {title}")
            self.text = gr.Textbox(
                start.text,
                label="Text",
                elem_id="mm-text",
                max_lines=4,
                visible=not loaded.takes_images,
                submit_btn="Look",
            )
            self.target = gr.Textbox(
                start.target,
                label="Text of the decoder (empty: the same)",
                elem_id="mm-target",
                visible=explorer.is_encoder_decoder,
            )
            self.image = gr.Image(
                start.image,
                label="Image",
                elem_id="mm-image",
                type="filepath",
                height=200,
                visible=loaded.takes_images,
                sources=["upload", "clipboard"],
                buttons=[],
            )
            with gr.Row(elem_classes="mm-places"):
                layers = list(zip(short_names(explorer.layers), explorer.layers))
                self.layer = gr.Dropdown(layers, value=layer, label="Layer", elem_id="mm-layer")
                self.normalizer = gr.Dropdown(label="Normalizer", elem_id="mm-normalizer", **self._names(layer))
                heads, rows = self._places(look)
                self.head = gr.Slider(0, step=1, label="Head", elem_id="mm-head", buttons=[], **heads)
                self.row = gr.Slider(0, step=1, label="Query (row)", elem_id="mm-query", buttons=[], **rows)
            self.error = gr.HTML(elem_id="mm-error", padding=False)
            drawn = ["" if look is None else draw(look) for draw in _PANELS]
            with gr.Row():
                with gr.Column(min_width=320):
                    panels = [gr.HTML(drawn[0], elem_id="mm-sigma", padding=False)]
                    with gr.Row(elem_classes="mm-scalars"):
                        self.sliders = {
                            name: gr.Slider(
                                -bound, bound, step=10**-DIGITS, label=name, buttons=[], elem_id=f"mm-{name}", **values
                            )
                            for (name, bound), values in zip(explorer.bounds.items(), self._scalars(layer, 0))
                        }
                    self.options = gr.Textbox(
                        label="Options (NAME=VALUE, then Enter)", elem_id="mm-options", visible=False
                    )
                    reset = gr.Button("Back to what was trained", size="sm", elem_id="mm-reset")
                    panels.append(gr.HTML(drawn[1], elem_id="mm-measures", padding=False))
                with gr.Column(min_width=320):
                    for name, html in zip(("row", "maps", "output"), drawn[2:]):
                        panels.append(gr.HTML(html, elem_id=f"mm-{name}", padding=False))
            self.panels = dict(zip(panels, _PANELS))
            self._on([self.row.input, self.options.submit, *(s.input for s in self.sliders.values())], self.move)
            self._on([self.text.submit, self.target.submit, self.image.change], self.enter)
            self._on([self.layer.input], self.to_layer)
            self._on([self.head.input], self.to_head)
            self._on([self.normalizer.input], self.to_normalizer)
            self._on([reset.click], self.reset)

    # -- events ----------------------------------------------------------------------------------------------------

    def move(self, given: Mapping[Any, Any]) -> dict[Any, Any]:
        """Another row, other scalars or options."""
        return self._drawn(self._look(given))

    def enter(self, given: Mapping[Any, Any]) -> dict[Any, Any]:
        """Another text or image, whose last row is looked at."""
        look = self._look({**given, self.row: -1})
        return self._drawn(look) | self._moved_places(look)

    def to_layer(self, given: Mapping[Any, Any]) -> dict[Any, Any]:
        """Another layer, as it was trained."""
        layer = given[self.layer]
        trained = self._trained(layer, 0)
        look = self._look({**given, self.head: 0} | trained)
        return self._drawn(look) | trained | self._moved_places(look)

    def to_head(self, given: Mapping[Any, Any]) -> dict[Any, Any]:
        """Another head; where it has scalars of its own, as they were trained."""
        changed = {}
        if self._explorer.differs_by_head(given[self.layer]):
            changed = self._trained(given[self.layer], given[self.head])
        return self._drawn(self._look({**given, **changed})) | changed

    def to_normalizer(self, given: Mapping[Any, Any]) -> dict[Any, Any]:
        """Another function with its default options; MultiMax with the scalars that the sliders have."""
        name = given[self.normalizer]
        options = " ".join(f"{key}={value}" for key, value in self._explorer.options(name).items())
        drawn = self._drawn(self._look({**given, self.options: options}))
        sliders = {
            slider: self._gr.update(visible=values["visible"] and name == "multimax")
            for slider, values in zip(self.sliders.values(), self._scalars(given[self.layer], 0, shown=True))
        }
        return drawn | sliders | {self.options: self._option_box(name, options)}

    def reset(self, given: Mapping[Any, Any]) -> dict[Any, Any]:
        """The layer's own normalizer, as it was trained."""
        trained = self._trained(given[self.layer], given[self.head])
        return self._drawn(self._look({**given, **trained})) | trained

    # -- what an event needs ---------------------------------------------------------------------------------------

    def _on(self, triggers: list[Any], method: Callable[[Mapping[Any, Any]], dict[Any, Any]]) -> None:
        places = {self.layer, self.head, self.row, self.normalizer, self.options, *self.sliders.values()}

        def told(given: Mapping[Any, Any]) -> dict[Any, Any]:
            try:
                return {self.error: "", **method(given)}
            except _ERRORS as error:
                return {self.error: pictures.error(one_line(error))}

        self._gr.on(
            triggers,
            told,
            places | {self.text, self.target, self.image},
            places | {self.error, *self.panels},
            show_progress="hidden",
            trigger_mode="always_last",
            preprocess=False,  # a number out of bounds is for `look` to judge; files are checked all the same
            api_name=method.__name__,
        )

    def _look(self, given: Mapping[Any, Any]) -> Look:
        def value(component: Any) -> Any:
            found = given[component]
            return found["value"] if isinstance(found, dict) else found

        def whole(component: Any) -> int:
            if value(component) is None:
                raise ValueError(f"{component.label} must be a number")
            return int(value(component))

        name, layer, image = value(self.normalizer), value(self.layer), given[self.image]
        scalars, options = (), ()
        if name == "multimax":
            mine = {scalar.name for scalar in self._explorer.scalars(layer)}
            scalars = tuple((key, value(slider)) for key, slider in self.sliders.items() if key in mine)
        elif name != AS_TRAINED:
            options = tuple(read_options((value(self.options) or "").split()).items())
        inputs = Inputs(value(self.text) or "", value(self.target) or "", image and image["path"])
        choice = Choice(name, scalars, options)
        return self._explorer.look(inputs, layer, whole(self.head), whole(self.row), choice)

    def _drawn(self, look: Look) -> dict[Any, Any]:
        return {panel: draw(look) for panel, draw in self.panels.items()}

    def _places(self, look: Look | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The sliders of head and row, as long as the look has heads and rows."""
        heads, head, rows, row = (1, 0, 1, 0) if look is None else (look.heads, look.head, len(look.queries), look.row)
        return (
            {"value": head, "maximum": max(1, heads - 1), "visible": heads > 1},
            {"value": row, "maximum": max(1, rows - 1), "visible": rows > 1},
        )

    def _moved_places(self, look: Look) -> dict[Any, Any]:
        return {slider: self._gr.update(**values) for slider, values in zip((self.head, self.row), self._places(look))}

    def _names(self, layer: str) -> dict[str, Any]:
        """The normalizers for a layer, of which its own is chosen."""
        choices = self._explorer.choices(layer)
        return {"choices": choices, "value": choices[0]}

    def _scalars(self, layer: str, head: int, shown: bool | None = None) -> list[dict[str, Any]]:
        """The sliders of all scalars: those that the layer has, where MultiMax is its own (or ``shown`` says so)."""
        shown = self._names(layer)["value"] == "multimax" if shown is None else shown
        trained = {scalar.name: round(scalar.value, DIGITS) for scalar in self._explorer.scalars(layer, head)}
        return [
            {"value": trained.get(name, 0.0), "visible": shown and name in trained} for name in self._explorer.bounds
        ]

    def _trained(self, layer: str, head: int) -> dict[Any, Any]:
        """The layer's own normalizer and scalars."""
        sliders = zip(self.sliders.values(), self._scalars(layer, head))
        return {
            self.normalizer: self._gr.update(**self._names(layer)),
            self.options: self._option_box(self._names(layer)["value"], ""),
            **{slider: self._gr.update(**values) for slider, values in sliders},
        }

    def _option_box(self, name: str, options: str) -> Any:
        return self._gr.update(value=options, visible=bool(self._explorer.options(name)))
