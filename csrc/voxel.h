// Every function of a probability that kernels sum, with its derivative: once, for CPUs and GPUs.
// `fastloss/sums.py` defines them, in the same order.
//
// V is a number or a vector of numbers, N the number. M, the mathematics of V, has
//   splat(n)         V of one number
//   power(v, n)      v^n for v ≥ 0, with 0^0 = 1
//   power_of_any(v, n)  the same, of ∞ as well
//   unless(z, v)     v, but 0 where z is 0
//   one_less_exponential(v)  1 − e^−v for v ≥ 0, exact where v is small as well
//   logarithm(v)     log v for v > 0
//   above_half(p, a, b)  a where p > ½, else b
//   absolute(v), sign(v)
#pragma once

#ifndef FL_DEVICE
#define FL_DEVICE inline
#endif

enum class Function : int {
  one,
  p,
  p_squared,
  log,
  log_rest,
  focal,
  focal_rest,
  generalized,
  log_power,
  error,
  sign,
  log_ratio,
  log_ratio_rest
};
constexpr int kFunctions = 13;

// The variable that a derivative is taken by. d/d(log p) = p d/dp stays finite and exact where p is
// near 0.
enum class By : int { p, log_p, log_q };

// p, q = 1 − p, −log p, −log q, and the target; `reads_*` says what of these a function reads.
template <class V>
struct Probability {
  V p, q, loss, loss_rest, g;
};

// q^γ (−log p). Where −log p is infinite, q is 1: there is no 0 · ∞.
template <class M, class V, class N>
FL_DEVICE V focal_value(V q, V loss, N gamma) {
  return M::power(q, gamma) * loss;
}
// Minus its derivative by log p. As dq = −p d(log p),
//   d/d(log p) [−q^γ log p] = −q^γ + γ q^(γ−1) p log p = −(q^γ − γ p log p · q^(γ−1)).
// The second part tends to 0 with p, as p log p does, and with q, as log p ≈ −q makes it −γ q^γ.
// `focal_rest` swaps p and q.
template <class M, class V, class N>
FL_DEVICE V focal_slope(V p, V q, V loss, N gamma) {
  if (gamma == N(0)) return M::splat(N(1));
  const V p_log_p = M::unless(p, -(p * loss));
  const V less = M::unless(q, M::power(q, gamma - N(1)));  // and q^γ is q times as much
  return q * less - gamma * (p_log_p * less);
}

// value(v, γ), and its derivative by `by`, slope(v, γ).
template <Function F>
struct FunctionOf;

template <>
struct FunctionOf<Function::one> {
  static constexpr By by = By::p;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>&, N) {
    return M::splat(N(1));
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>&, N) {
    return M::splat(N(0));
  }
};

template <>
struct FunctionOf<Function::p> {
  static constexpr By by = By::p;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N) {
    return v.p;
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>&, N) {
    return M::splat(N(1));
  }
};

template <>
struct FunctionOf<Function::p_squared> {
  static constexpr By by = By::p;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N) {
    return v.p * v.p;
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>& v, N) {
    return N(2) * v.p;
  }
};

template <>
struct FunctionOf<Function::log> {
  static constexpr By by = By::log_p;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N) {
    return v.loss;
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>&, N) {
    return M::splat(N(-1));
  }
};

template <>
struct FunctionOf<Function::log_rest> {
  static constexpr By by = By::log_q;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N) {
    return v.loss_rest;
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>&, N) {
    return M::splat(N(-1));
  }
};

template <>
struct FunctionOf<Function::focal> {
  static constexpr By by = By::log_p;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N gamma) {
    return focal_value<M>(v.q, v.loss, gamma);
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>& v, N gamma) {
    return -focal_slope<M>(v.p, v.q, v.loss, gamma);
  }
};

template <>
struct FunctionOf<Function::focal_rest> {
  static constexpr By by = By::log_q;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N gamma) {
    return focal_value<M>(v.p, v.loss_rest, gamma);
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>& v, N gamma) {
    return -focal_slope<M>(v.q, v.p, v.loss_rest, gamma);
  }
};

// (1 − p^γ) / γ = (1 − e^(−γ (−log p))) / γ; its derivative by log p is −p^γ.
template <>
struct FunctionOf<Function::generalized> {
  static constexpr By by = By::log_p;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N gamma) {
    return M::one_less_exponential(gamma * v.loss) * (N(1) / gamma);
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>& v, N gamma) {
    return -M::power(v.p, gamma);
  }
};

// (−log p)^γ. For γ < 1 its derivative is infinite at p = 1, where that by the logit is 0.
template <>
struct FunctionOf<Function::log_power> {
  static constexpr By by = By::log_p;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N gamma) {
    return M::power_of_any(v.loss, gamma);
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>& v, N gamma) {
    return -(gamma * M::unless(v.loss, M::power_of_any(v.loss, gamma - N(1))));
  }
};

// p − g, exact where both are near 1: it is then (1−g) − q.
template <class M, class N, class V>
FL_DEVICE V difference(const Probability<V>& v) {
  return M::above_half(v.p, (M::splat(N(1)) - v.g) - v.q, v.p - v.g);
}

template <>
struct FunctionOf<Function::error> {
  static constexpr By by = By::p;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N) {
    return M::absolute(difference<M, N>(v));
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>& v, N) {
    return M::sign(difference<M, N>(v));
  }
};

template <>
struct FunctionOf<Function::sign> {
  static constexpr By by = By::p;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N) {
    return M::sign(difference<M, N>(v));
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>&, N) {
    return M::splat(N(0));
  }
};

// log g − log p, and of the other outcome. Where g is 0, log g is left out.
template <>
struct FunctionOf<Function::log_ratio> {
  static constexpr By by = By::log_p;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N) {
    return M::unless(v.g, M::logarithm(v.g)) + v.loss;
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>&, N) {
    return M::splat(N(-1));
  }
};

template <>
struct FunctionOf<Function::log_ratio_rest> {
  static constexpr By by = By::log_q;
  template <class M, class V, class N>
  static FL_DEVICE V value(const Probability<V>& v, N) {
    const V rest = M::splat(N(1)) - v.g;
    return M::unless(rest, M::logarithm(rest)) + v.loss_rest;
  }
  template <class M, class V, class N>
  static FL_DEVICE V slope(const Probability<V>&, N) {
    return M::splat(N(-1));
  }
};

// Whether a function or its derivative reads −log p; −log q; q, though no logarithm.
FL_DEVICE constexpr bool reads_log(Function f) {
  return f == Function::log || f == Function::focal || f == Function::generalized ||
         f == Function::log_power || f == Function::log_ratio;
}
FL_DEVICE constexpr bool reads_log_rest(Function f) {
  return f == Function::log_rest || f == Function::focal_rest || f == Function::log_ratio_rest;
}
FL_DEVICE constexpr bool reads_rest(Function f) {
  return f == Function::focal || f == Function::error || f == Function::sign;
}

// Calls g(FunctionOf<F>{}) for a function chosen at run time.
template <class G>
FL_DEVICE void with_function(Function f, const G& g) {
  switch (f) {
    case Function::one:
      return g(FunctionOf<Function::one>{});
    case Function::p:
      return g(FunctionOf<Function::p>{});
    case Function::p_squared:
      return g(FunctionOf<Function::p_squared>{});
    case Function::log:
      return g(FunctionOf<Function::log>{});
    case Function::log_rest:
      return g(FunctionOf<Function::log_rest>{});
    case Function::focal:
      return g(FunctionOf<Function::focal>{});
    case Function::focal_rest:
      return g(FunctionOf<Function::focal_rest>{});
    case Function::generalized:
      return g(FunctionOf<Function::generalized>{});
    case Function::log_power:
      return g(FunctionOf<Function::log_power>{});
    case Function::error:
      return g(FunctionOf<Function::error>{});
    case Function::sign:
      return g(FunctionOf<Function::sign>{});
    case Function::log_ratio:
      return g(FunctionOf<Function::log_ratio>{});
    case Function::log_ratio_rest:
      return g(FunctionOf<Function::log_ratio_rest>{});
  }
}
