// The formulas of one voxel, on processors and GPUs. V is a number or a vector of numbers.
#pragma once

#ifndef FL_DEVICE
#define FL_DEVICE inline
#endif

// q^γ log p, negated, as a loss of a voxel: p is the probability of what is there, q = 1 − p.
template <class V>
FL_DEVICE V focal_value(V q_power, V minus_log_p) {
  return q_power * minus_log_p;
}

// The derivative of q^γ log p by log p: q^γ − γ p log p · q^(γ−1) with p log p given.
template <class V, class T>
FL_DEVICE V focal_slope(V q_power, V q_power_less, V p_log_p, T gamma) {
  return q_power - gamma * (p_log_p * q_power_less);
}
