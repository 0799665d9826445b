"""The weights that the browser plots are those of pladis_core."""

from __future__ import annotations

import pytest
import torch

from pladis_core import entmax, pladis_weights

ROWS = {
    "plot": None,
    "equal": [0.5] * 7,
    "one": [3.0],
    "tied at the top": [2.0, 2.0, -1.0, 0.3],
    "far apart": [300.0, 0.0, -300.0],
    "large": [1000.0, 1000.4, 999.7],
    "long": [((37 * i) % 101) / 20 for i in range(77)],
}
CALL = """async ([row, scale, alpha]) => {
    const { softmax, entmax, mix } = await import("/pladis_math.js");
    const { SCORES } = await import("/pladis_plot.js");
    const scores = row ?? SCORES;
    const [dense, sparse] = [softmax(scores), entmax(scores, alpha)];
    return [scores, dense, sparse, mix(dense, sparse, scale)];
}"""


@pytest.mark.parametrize("alpha", [1.0, 1.001, 1.05, 1.25, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("row", ROWS)
def test_weights_are_those_of_pladis_core(modules, row, alpha):
    for scale in (0.0, 0.35, 2.0, 10.0):
        answer = modules.evaluate(CALL, [ROWS[row], scale, alpha])
        scores, *found = (torch.tensor(values, dtype=torch.float64) for values in answer)
        expected = scores.softmax(-1), entmax(scores, alpha), pladis_weights(scores, scale, alpha)
        for weights, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(weights, reference, rtol=0, atol=1e-6)
