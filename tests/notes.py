"""Which notes of a run do tests make up, for pages about runs that are large or odd?"""

from __future__ import annotations

import numpy as np

from cuvis_dist.report.kept import Kept

LONG = "recording_of_a_very_long_name_without_any_place_to_break_it_" * 3
RECORD = {
    "job": "run",
    "name": "made up",
    "trainrun": f"/data/{LONG}/trainrun.yaml",
    "status": "done",
    "started": "2026-01-01T00:00:00+00:00",
    "finished": "2026-01-01T00:05:00+00:00",
}


def kept(
    recordings: int = 2, bands: int = 186, known: bool = True, epochs: int = 3, **record
) -> Kept:
    """Return notes of a run with some recordings and epochs, and all kinds of nodes."""
    random = np.random.default_rng(1)
    mean = np.linspace(0.2, 0.5, bands)
    cov = np.diag(np.linspace(0.01, 0.02, bands))
    spread = np.sqrt(cov.diagonal())
    found = {
        f"{LONG}{i}": {"n": 100, "mean": mean + random.normal(0, 0.01), "std": spread}
        for i in range(recordings)
    }
    values = {"n": 100 * recordings, "mean": mean, "std": spread, "covariance": cov}
    port = {"source": "data.cube", "bands": True, "values": values, "recordings": found}
    loadings = np.linalg.qr(random.normal(size=(bands, 6)))[0].T
    nodes = [
        {"node": "pca", "kind": "loadings", "bands": True,
         "values": {"loadings": loadings, "variances": np.geomspace(1, 1e-3, 6)}},
        {"node": "rx", "kind": "gaussian", "bands": False,
         "values": {"mean": mean[:6], "covariance": cov[:6, :6], "eps": np.array(1e-6)}},
    ]  # fmt: skip
    wavelengths = np.linspace(400, 900, bands) if known else None
    measured = {"ports": [port]}
    learnt = {"initialized": nodes, "wavelengths": wavelengths}
    diary = [{"hook": "epoch_start", "at": 0.0, "epoch": 1}]
    for epoch in range(1, epochs + 1):
        values = {"train_loss": 1 / epoch, "val_loss": 2 / epoch, f"{LONG}/iou": 0.5}
        diary.append({"hook": "epoch_end", "at": float(epoch), "epoch": epoch, "metrics": values})
        diary.append({"hook": "epoch_start", "at": float(epoch), "epoch": epoch + 1})
    return Kept("/out/a", RECORD | record, measured, learnt, {}, diary)


def judged(
    scores: np.ndarray, annotated: np.ndarray | None = None, bands: int = 5, **others
) -> dict:
    """Return what is kept of a split of one frame with these scores ``[h, w]``."""
    known = np.isfinite(scores)
    marked = np.zeros(scores.shape, bool) if annotated is None else annotated
    counts = np.stack([known & ~marked, known & marked], axis=-1)[known].astype(int)
    values = np.sort(scores[known])
    each = {"scores": values, "counts": counts[np.argsort(scores[known], kind="stable")]}
    picture = {
        "why": "worst", "uid": "recording.cu3s#0", "recording": "recording.cu3s",
        "colours": np.repeat(scores[..., None], 3, axis=-1), "bands": (0, 0, 0),
        "scores": scores, "decided": known & (scores > 1), "annotated": annotated, "wrong": 0.25,
        "anomalies": int(marked.sum()), "block": 1,
    }  # fmt: skip
    part = {
        "frames": 1, "annotated": annotated is not None, "unknown": int((~known).sum()),
        "bands": 5, "wavelengths": None, "wrong": np.array([0.25]),
        "counts": {"scores": each, "logits": each}, "pictures": [picture | others],
    }  # fmt: skip
    return {"val": part}
