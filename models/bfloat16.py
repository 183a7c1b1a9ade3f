"""bfloat16 weights: what they lose is measured on held-out data, kept beside the bundle, and looked at before use."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.bundle import Bundle, BundleError
from models.manifest import Count, Sha256

RECORD = "bfloat16.json"
MIN_PREDICTIONS = 2_000  # one more that is wrong is then a twentieth of a percentage point at most


class Bfloat16Loss(BaseModel):
    """How many held-out predictions are right with either kind of weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    manifest_sha256: Sha256 = Field(description="of the very bundle that was measured; it covers the weights")
    predictions: Count
    float32_percent: float = Field(ge=0, le=100)
    bfloat16_percent: float = Field(ge=0, le=100)

    @property
    def points(self) -> float:
        """Percentage points; below 0 if bfloat16 does better."""
        return self.float32_percent - self.bfloat16_percent


def write_loss(folder: Path, loss: Bfloat16Loss) -> None:
    """Into a bundle's folder."""
    (folder / RECORD).write_text(loss.model_dump_json(indent=2) + "\n")


def use_bfloat16(bundle: Bundle, max_loss_points: float) -> Bfloat16Loss:
    """Round the bundle's weights; what that costs, as it was measured.

    Raises BundleError if it was not measured, of this very bundle and on enough predictions, or costs too much.
    """
    loss = _measured(bundle)
    if loss.predictions < MIN_PREDICTIONS:
        raise BundleError(
            bundle.folder,
            RECORD,
            f"bfloat16 was measured on {loss.predictions:,} held-out predictions, {MIN_PREDICTIONS:,} are needed",
        )
    if loss.points > max_loss_points:
        raise BundleError(
            bundle.folder,
            RECORD,
            f"bfloat16 loses {loss.points:.3f} percentage points of {loss.float32_percent:.3f}, "
            f"more than the {max_loss_points:g} allowed",
        )
    bundle.predictor.network.to_bfloat16()
    return loss


def _measured(bundle: Bundle) -> Bfloat16Loss:
    how = f"measure it by `python -m models evaluate {bundle.manifest.name} --bfloat16`"
    try:
        loss = Bfloat16Loss.model_validate_json((bundle.folder / RECORD).read_bytes())
    except FileNotFoundError:
        raise BundleError(bundle.folder, RECORD, f"what bfloat16 loses was never measured; {how}") from None
    except OSError as error:
        raise BundleError(bundle.folder, RECORD, f"cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or RECORD
        raise BundleError(bundle.folder, RECORD, f"{field}: {first['msg']}") from None
    if loss.manifest_sha256 != bundle.manifest.manifest_sha256:
        raise BundleError(bundle.folder, RECORD, f"another bundle was measured than this one; {how}")
    return loss
