// The weights of pladis_core for one row of scores, in float64. Pure functions; tests/web compares them with pladis_core.

/**
 * exp(score) / sum of exp(scores)
 * @param {number[]} scores
 */
export function softmax(scores) {
  const top = Math.max(...scores);
  return normalise(scores.map((score) => Math.exp(score - top)));
}

/**
 * alpha-entmax for 1 <= alpha <= 2: 1 is softmax, 2 is sparsemax.
 * @param {number[]} scores
 * @param {number} alpha
 * @returns {number[]}
 */
export function entmax(scores, alpha) {
  const slope = alpha - 1;
  if (slope === 0) return softmax(scores);
  const top = Math.max(...scores);
  const shifted = scores.map((score) => slope * (score - top));
  const weights = (threshold) => shifted.map((score) => Math.max(score - threshold, 0) ** (1 / slope));
  // the largest weight alone is 1 at the lower bound; no weight is above 1 / n at the upper
  let [low, high] = [-1, -(scores.length ** -slope)];
  for (let step = 0; step < 60; step++) {
    const middle = (low + high) / 2;
    if (sum(weights(middle)) >= 1) low = middle;
    else high = middle;
  }
  return normalise(weights(low));
}

/**
 * (1 - scale) * dense + scale * sparse
 * @param {number[]} dense
 * @param {number[]} sparse
 * @param {number} scale
 */
export function mix(dense, sparse, scale) {
  return dense.map((weight, i) => (1 - scale) * weight + scale * sparse[i]);
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function normalise(values) {
  const total = sum(values);
  return values.map((value) => value / total);
}
