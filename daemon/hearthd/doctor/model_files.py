"""The model that is configured: installed, whole, and how fast this machine's memory lets it write. Called by `cli`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from hearthd.configuration.config import Config
from hearthd.doctor.finding import Finding, good, note, problem
from hearthd.errors import HearthdError

if TYPE_CHECKING:
    from hearthd.bundles.bundle import Bundle

__all__ = ["check_model", "check_speed"]

# Where a chat usually is.
_CONTEXT: Final = 256


def check_model(config: Config, *, verify: bool = True) -> "tuple[Bundle | None, list[Finding]]":
    """Open the bundle as the daemon does; verify: with the hash of every file. Returns it, None if it cannot be."""
    from hearthd.bundles.store import Store

    name = config.model.name
    try:
        bundle = Store(config.model.directory).open(name, verify=verify)
    except HearthdError as error:
        text, _, remedy = str(error).rpartition("; ")
        return None, [problem("model", text or str(error), remedy if text else f"hearthd model add {name}")]
    checked = "every file has its hash" if verify else "the hashes were not looked at"
    return bundle, [good("model", f"{name}, {bundle.size_bytes / 1e6:.0f} MB: {checked}")]


def check_speed(bundle: "Bundle", num_threads: int, bytes_per_second: float | None = None) -> Iterable[Finding]:
    """Say what the memory allows. bytes_per_second: measured here if None, which takes a second and 64 MB."""
    from hearthd.bench.bandwidth import MIN_BUFFER_BYTES, ReadBandwidth, make_buffer
    from hearthd.bench.traffic import StepTraffic

    if bytes_per_second is None:
        with ReadBandwidth(make_buffer(MIN_BUFFER_BYTES), num_threads) as bandwidth:
            bytes_per_second = bandwidth.measure()
    step = StepTraffic.of_model(bundle.model_path).bytes_per_step(num_streams=1, context=_CONTEXT)
    yield note(
        "speed",
        f"the memory delivers {bytes_per_second / 1e9:.1f} GB/s to {num_threads} threads; a token of this model reads "
        f"{step / 1e6:.0f} MB, so that no program writes more than {bytes_per_second / step:.0f} tokens/s here",
        "`hearthd bench` measures what Hearth reaches of that",
    )
