"""What MultiMax adds to the card that PEFT writes beside an adapter."""

import re
from pathlib import Path

from torch import nn

from hf_multimax.normalizers.base import named_places
from hf_multimax.peft.names import CONTAINER

__all__ = ["add_to_card"]

_BLOCK = """<!-- multimax-adapter -->
## Learned attention

{what} It loads onto the stock base, which needs `pip install hf-multimax`:

```python
import hf_multimax  # before the adapter is loaded
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this repository")
```
<!-- /multimax-adapter -->"""


def add_to_card(base: nn.Module, card: Path, adapters: list[str]) -> None:
    """Put a marked block into the card of adapters that have scalars, in the place of the one it has, or at its end."""
    counts = {name: _scalars(base, name) for name in adapters}
    places = max((len(found) for found in counts.values()), default=0)
    if not places or not card.is_file():
        return
    numbers = sorted({sum(found) for found in counts.values() if found})
    scalars = " or ".join(f"{number:,}" for number in numbers)
    normalizer = base.config.multimax["normalizer"]
    what = f"SoftMax is replaced by `{normalizer}`, whose {scalars} scalars in {places} places are in this adapter."
    text, block = card.read_text(encoding="utf-8"), _BLOCK.format(what=what)
    pattern = re.compile(r"<!-- multimax-adapter -->.*?<!-- /multimax-adapter -->", flags=re.DOTALL)
    new = pattern.sub(lambda _: block, text) if pattern.search(text) else f"{text.rstrip()}\n\n{block}\n"
    card.write_text(new, encoding="utf-8")


def _scalars(base: nn.Module, adapter: str) -> list[int]:
    """How many scalars an adapter has in each place that it has some in."""
    copies = (getattr(m, CONTAINER, getattr(m, "modules_to_save", {})) for _, m in named_places(base))
    return [sum(p.numel() for p in own[adapter].parameters()) for own in copies if adapter in own]
