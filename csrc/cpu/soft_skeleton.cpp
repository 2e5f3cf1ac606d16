// Soft skeletons and their gradients, plane by plane. Compiled once per instruction set.
//
// With n iterations, x₀ = p, erosions x_{i+1} = E(x_i) and openings o_i = D(x_{i+1}):
//
//   u_i = x_i − o_i,  d_i = max(u_i, 0),  s_0 = d_0,  s_i = s_{i−1} + max(d_i − s_{i−1} d_i, 0).
//
// E is the least of the minima over three neighbours along each axis, D the maximum over a block of
// 3 × 3 × 3. Everything is local, so all levels travel through the volume together: at time t plane
// t is read, plane t − i of x_i follows, and rings hold the last few planes of each level. Nothing
// as large as the volume is kept.
//
// The gradient, with [·] = 1 where a condition holds and U_i the derivative by u_i:
//
//   from i = n down to 1, G being the derivative by s_i:
//     U_i = G [t_i > 0] (1 − s_{i−1}) [u_i > 0],  G ← G − G [t_i > 0] d_i,  t_i = d_i − s_{i−1} d_i
//   U_0 = G [u_0 > 0]
//   X_i = U_i − Dᵀ_{x_i}(U_{i−1}) + Eᵀ_{x_i}(X_{i+1}),  the derivative by x_i;  X_0 is the result.
//
// Dᵀ and Eᵀ send the derivative to the voxel that was chosen. Ties are broken as in PyTorch: a
// maximum along several axes chooses the first in memory order, which is to choose the first along
// x, then of these the first along y, then along z; and of equal minima along different axes,
// min(min(z, y), x) gives each side half. So Dᵀ goes along z, y and x one after another, Eᵀ along
// each of them for itself.
#include "vec.h"  // before voxel.h, which it tells how functions are inlined

#include <algorithm>
#include <limits>

#include "rows.h"
#include "soft_skeleton.h"

namespace {

using fastloss::SkeletonJob;
using fastloss::Volumes;

constexpr int64_t kAlignment = 64;

// Hands out pieces of the working memory; without any it counts what is wanted.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class S>
  S* take(int64_t count) {
    char* here = base ? base + used : nullptr;
    used += (count * int64_t(sizeof(S)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<S*>(here);
  }
};

// The last `span` planes of an array.
template <class T>
struct Ring {
  T* data;
  int64_t span, size;
  T* plane(int64_t z) const { return data + z % span * size; }
};

// What arrives at a voxel from those whose window along an axis chose it. `g`: what its
// predecessor, itself and its successor have to give; `a`: the numbers they chose among, from two
// before it to two after it.
template <class T, bool kMax>
FL_INLINE Vec<T> route(const Vec<T> (&g)[3], const Vec<T> (&a)[5]) {
  const auto beats = [](Vec<T> one, Vec<T> other) { return kMax ? one > other : one < other; };
  const auto equals = [](Vec<T> one, Vec<T> other) { return kMax ? one >= other : one <= other; };
  const IVec<T> before = beats(a[2], a[1]), after = equals(a[2], a[3]);
  const Vec<T> next = keep<T>(after & equals(a[2], a[4]), g[2]);
  const Vec<T> own = keep<T>(before & after, g[1]);
  return next + own + keep<T>(before & beats(a[2], a[0]), g[0]);
}
template <class T, bool kMax>
FL_INLINE Vec<T> route(const T* const (&g)[3], const T* const (&a)[5], int64_t x) {
  const Vec<T> from[3] = {load<T>(g[0] + x), load<T>(g[1] + x), load<T>(g[2] + x)};
  const Vec<T> among[5] = {load<T>(a[0] + x), load<T>(a[1] + x), load<T>(a[2] + x),
                           load<T>(a[3] + x), load<T>(a[4] + x)};
  return route<T, kMax>(from, among);
}

template <class T>
class Wave {
 public:
  Wave(const SkeletonJob& job, void* memory)
      : job_(job), n_(job.iterations), arena_{static_cast<char*>(memory)} {
    pitch_ = (job.shape[2] + L - 1) / L * L;
    plane_ = job.shape[1] * pitch_;
    for (Ring<T>** rings : {&x_, &m_, &u_, &along_z_, &within_})
      *rings = arena_.take<Ring<T>>(n_ + 2);
    for (int64_t i = 0; i < n_ + 2; ++i) {
      const bool back = job.backward;
      make(x_, i, back ? 2 * (n_ - i) + 7 : std::max<int64_t>(n_ + 3 - i, 3));
      if (i > 0) make(m_, i, back ? 2 * (n_ - i) + 7 : n_ + 4 - i);
      if (back && i <= n_) make(u_, i, n_ + 3 - i);
      if (back && i > 0) make(along_z_, i, 3);
      if (back && i > 0) make(within_, i, 2);
    }
    const T infinity = std::numeric_limits<T>::infinity();
    low_ = constant_row(-infinity);
    high_ = constant_row(infinity);
    zero_ = constant_row(T(0));
    for (T** line : {&line_, &line_of_g_}) *line = arena_.take<T>(pitch_ + 2 * L);
    out_row_ = arena_.take<T>(pitch_);
    upstream_row_ = arena_.take<T>(pitch_);
    for (T** plane : {&rows_, &g_, &h_}) *plane = arena_.take<T>(plane_);
    depths_ = arena_.take<T>((n_ + 1) * L);
    slopes_ = arena_.take<T>((n_ + 1) * L);
  }

  size_t bytes() const { return size_t(arena_.used); }

  void run(int64_t channel, int64_t first, int64_t last) {
    const int64_t b = channel / job_.channels, c = channel % job_.channels;
    p_ = base(job_.p, b, c);
    upstream_ = base(job_.upstream, b, c);
    out_ = base(job_.out, b, c);
    start_ = std::max<int64_t>(first - job_.reach(), 0);
    planes_ = std::min(last + job_.reach(), job_.shape[0]) - start_;
    first_ = first - start_;
    last_ = last - start_;
    const int64_t lag = job_.backward ? 2 * n_ + 4 : n_ + 2;
    for (int64_t t = 0; t < planes_ + lag; ++t) {
      if (t < planes_) read(t);
      for (int64_t i = 0; i <= n_; ++i) {
        if (!inside(t - 1 - i)) continue;
        erode(i, t - 1 - i);
        spread(i + 1, t - 1 - i);
      }
      if (inside(t - 2 - n_)) join(t - 2 - n_);
      if (!job_.backward) continue;
      for (int64_t i = n_ + 1; i >= 0; --i) {
        const int64_t z = t - 2 * n_ - 4 + i;
        if (!inside(z)) continue;
        differentiate(i, z);
        if (i > 0) split(i, z);
        else write(z);
      }
    }
  }

 private:
  static constexpr int64_t L = lanes<T>;
  const SkeletonJob& job_;
  const int64_t n_;
  Arena arena_;
  int64_t pitch_, plane_;
  const char *p_ = nullptr, *upstream_ = nullptr;
  char* out_ = nullptr;
  // The planes that are read, from plane `start_` of the volume on, and those of them to write.
  int64_t start_ = 0, planes_ = 0, first_ = 0, last_ = 0;

  Ring<T>*x_, *m_;             // x_i, and its maxima over 3 × 3 neighbours within the plane
  Ring<T>* u_;                 // U_i
  Ring<T>*along_z_, *within_;  // of X_i: what Eᵀ sends along z; what x_{i−1} gets within planes
  T *low_, *high_, *zero_;     // rows outside of the volume
  T *line_, *line_of_g_;       // a row with what is outside at both ends
  T *out_row_, *upstream_row_;
  T *rows_, *g_, *h_;    // planes
  T *depths_, *slopes_;  // of one vector of voxels, d_i and the factor of U_i

  void make(Ring<T>* rings, int64_t i, int64_t span) {
    // No more than the volume has.
    const int64_t most = std::min(span, job_.shape[0]);
    T* data = arena_.take<T>(most * plane_);
    if (arena_.base) rings[i] = {data, most, plane_};
  }
  T* constant_row(T value) {
    T* row = arena_.take<T>(pitch_);
    if (arena_.base) std::fill(row, row + pitch_, value);
    return row;
  }
  static char* base(const Volumes& v, int64_t b, int64_t c) {
    return v.data ? v.data + b * v.batch_stride + c * v.channel_stride : nullptr;
  }
  bool inside(int64_t z) const { return z >= 0 && z < planes_; }
  int64_t rows() const { return job_.shape[1]; }
  int64_t width() const { return job_.shape[2]; }

  template <class F>
  FL_INLINE void each(const F& f) const {
    for (int64_t x = 0; x < pitch_; x += L) f(x);
  }

  void fetch(const Volumes& v, const char* from, int64_t z, int64_t y, T* row) const {
    const char* p = from + (start_ + z) * v.stride[0] + y * v.stride[1];
    with_storage<T>(job_.dtype, [&](auto kind) {
      load_run<decltype(kind), T>(p, v.stride[2], int(width()), row);
    });
  }
  void save(int64_t z, int64_t y, const T* row) const {
    const Volumes& v = job_.out;
    char* p = out_ + (start_ + z) * v.stride[0] + y * v.stride[1];
    with_storage<T>(job_.dtype, [&](auto kind) {
      using S = decltype(kind);
      if (std::is_same<S, T>::value && v.stride[2] == int64_t(sizeof(S))) {
        std::memcpy(p, row, size_t(width()) * sizeof(S));
        return;
      }
      for (int64_t x = 0; x < width(); ++x) {
        S value;
        narrow(row[x], &value);
        std::memcpy(p + x * v.stride[2], &value, sizeof value);
      }
    });
  }

  // A copy of a row that has `outside` at both ends.
  const T* lined(const T* row, T* line, T outside) const {
    T* to = line + L;
    to[-2] = to[-1] = outside;
    std::memcpy(to, row, size_t(width()) * sizeof(T));
    to[width()] = to[width() + 1] = outside;
    return to;
  }
  // Five planes around z, null outside of the volume; and five rows around y of them, or of one.
  void around(const Ring<T>& ring, int64_t z, const T* (&planes)[5]) const {
    for (int64_t k = 0; k < 5; ++k) planes[k] = inside(z + k - 2) ? ring.plane(z + k - 2) : nullptr;
  }
  void across(const T* const (&planes)[5], int64_t y, const T* outside, const T* (&rows)[5]) const {
    for (int k = 0; k < 5; ++k) rows[k] = planes[k] ? planes[k] + y * pitch_ : outside;
  }
  void along(const T* plane, int64_t y, const T* outside, const T* (&found)[5]) const {
    for (int64_t k = 0; k < 5; ++k) {
      const int64_t at = y + k - 2;
      found[k] = at >= 0 && at < rows() ? plane + at * pitch_ : outside;
    }
  }

  void read(int64_t z) {
    T* plane = x_[0].plane(z);
    for (int64_t y = 0; y < rows(); ++y) fetch(job_.p, p_, z, y, plane + y * pitch_);
  }

  // Plane z of x_{i+1}.
  void erode(int64_t i, int64_t z) {
    const T* from = x_[i].plane(z);
    const T* before = z > 0 ? x_[i].plane(z - 1) : from;
    const T* after = inside(z + 1) ? x_[i].plane(z + 1) : from;
    T* to = x_[i + 1].plane(z);
    for (int64_t y = 0; y < rows(); ++y) {
      const T* own = from + y * pitch_;
      const T* line = lined(own, line_, high_[0]);
      const T* left = y > 0 ? own - pitch_ : own;
      const T* right = y + 1 < rows() ? own + pitch_ : own;
      const T *b = before + y * pitch_, *a = after + y * pitch_;
      each([&](int64_t x) {
        Vec<T> v = smaller(load<T>(line + x - 1), load<T>(line + x + 1));
        v = smaller(v, load<T>(own + x));
        v = smaller(v, smaller(load<T>(left + x), load<T>(right + x)));
        v = smaller(v, smaller(load<T>(b + x), load<T>(a + x)));
        store<T>(to + y * pitch_ + x, v);
      });
    }
  }

  // Maxima along x of plane z of x_i, into `rows_`.
  void widen_rows(int64_t i, int64_t z) {
    for (int64_t y = 0; y < rows(); ++y) {
      const T* line = lined(x_[i].plane(z) + y * pitch_, line_, low_[0]);
      each([&](int64_t x) {
        const Vec<T> v = larger(load<T>(line + x - 1), load<T>(line + x));
        store<T>(rows_ + y * pitch_ + x, larger(v, load<T>(line + x + 1)));
      });
    }
  }
  // Plane z of m_i.
  void spread(int64_t i, int64_t z) {
    widen_rows(i, z);
    T* to = m_[i].plane(z);
    for (int64_t y = 0; y < rows(); ++y) {
      const T* own = rows_ + y * pitch_;
      const T* left = y > 0 ? own - pitch_ : own;
      const T* right = y + 1 < rows() ? own + pitch_ : own;
      each([&](int64_t x) {
        const Vec<T> v = larger(load<T>(left + x), load<T>(own + x));
        store<T>(to + y * pitch_ + x, larger(v, load<T>(right + x)));
      });
    }
  }

  // Plane z of the skeleton, or of all U_i.
  void join(int64_t z) {
    const bool back = job_.backward;
    if (!back && (z < first_ || z >= last_)) return;
    for (int64_t y = 0; y < rows(); ++y) {
      if (back) fetch(job_.upstream, upstream_, z, y, upstream_row_);
      each([&](int64_t x) { back ? join_backward(z, y, x) : join_forward(z, y, x); });
      if (!back) save(z, y, out_row_);
    }
  }
  // x_i − o_i.
  FL_INLINE Vec<T> difference(int64_t i, int64_t z, int64_t at) const {
    const T* own = m_[i + 1].plane(z);
    const T* before = z > 0 ? m_[i + 1].plane(z - 1) : own;
    const T* after = inside(z + 1) ? m_[i + 1].plane(z + 1) : own;
    Vec<T> opened = larger(load<T>(before + at), load<T>(after + at));
    opened = larger(opened, load<T>(own + at));
    return load<T>(x_[i].plane(z) + at) - opened;
  }
  FL_INLINE void join_forward(int64_t z, int64_t y, int64_t x) {
    const Vec<T> zero = splat<T>(T(0));
    Vec<T> s = zero;
    for (int64_t i = 0; i <= n_; ++i) {
      const Vec<T> d = larger(zero, difference(i, z, y * pitch_ + x));
      s += larger(zero, remaining(d, s));
    }
    store<T>(out_row_ + x, s);
  }
  FL_INLINE void join_backward(int64_t z, int64_t y, int64_t x) {
    const Vec<T> zero = splat<T>(T(0));
    const int64_t at = y * pitch_ + x;
    Vec<T> s = zero;
    for (int64_t i = 0; i <= n_; ++i) {
      const Vec<T> u = difference(i, z, at), d = larger(zero, u), t = remaining(d, s);
      store<T>(depths_ + i * L, keep<T>(t > zero, d));
      store<T>(slopes_ + i * L, keep<T>((t > zero) & (u > zero), T(1) - s));
      s += larger(zero, t);
    }
    Vec<T> g = load<T>(upstream_row_ + x);
    for (int64_t i = n_; i >= 0; --i) {
      store<T>(u_[i].plane(z) + at, g * load<T>(slopes_ + i * L));
      g -= g * load<T>(depths_ + i * L);
    }
  }
  // d − s d, each rounded: as one operation its sign could be another near s = 1.
  FL_INLINE static Vec<T> remaining(Vec<T> d, Vec<T> s) { return d - once(s * d); }

  // Plane z of X_i, into `g_`.
  void differentiate(int64_t i, int64_t z) {
    if (i <= n_) from_erosion(i, z);
    else std::fill(g_, g_ + plane_, T(0));
    if (i > 0) from_dilation(i, z);
  }
  void from_erosion(int64_t i, int64_t z) {
    const T *own = u_[i].plane(z), *within = within_[i + 1].plane(z);
    const T *planes[5], *sent[5], *a[5], *g[5];
    around(x_[i], z, planes);
    around(along_z_[i + 1], z, sent);
    for (int64_t y = 0; y < rows(); ++y) {
      across(planes, y, high_, a);
      across(sent, y, zero_, g);
      const T* const three[3] = {g[1], g[2], g[3]};
      const int64_t row = y * pitch_;
      if (job_.has_z)
        each([&](int64_t x) {
          const Vec<T> v = load<T>(own + row + x) + load<T>(within + row + x);
          store<T>(g_ + row + x, v + route<T, false>(three, a, x));
        });
      else
        each([&](int64_t x) {
          store<T>(g_ + row + x, load<T>(own + row + x) + load<T>(within + row + x));
        });
    }
  }
  void from_dilation(int64_t i, int64_t z) {
    const T *planes[5], *sent[5], *a[5], *g[5];
    around(m_[i], z, planes);
    around(u_[i - 1], z, sent);
    for (int64_t y = 0; y < rows(); ++y) {
      across(planes, y, low_, a);
      across(sent, y, zero_, g);
      const T* const three[3] = {g[1], g[2], g[3]};
      each([&](int64_t x) { store<T>(h_ + y * pitch_ + x, route<T, true>(three, a, x)); });
    }
    widen_rows(i, z);
    for (int64_t y = 0; y < rows(); ++y) {
      along(rows_, y, low_, a);
      along(h_, y, zero_, g);
      const T* const three[3] = {g[1], g[2], g[3]};
      each([&](int64_t x) { store<T>(out_row_ + x, route<T, true>(three, a, x)); });
      const T* from = lined(out_row_, line_of_g_, T(0));
      const T* among = lined(x_[i].plane(z) + y * pitch_, line_, low_[0]);
      T* to = g_ + y * pitch_;
      each([&](int64_t x) {
        store<T>(to + x, load<T>(to + x) - route_in_line<true>(from + x, among + x));
      });
    }
  }
  template <bool kMax>
  FL_INLINE Vec<T> route_in_line(const T* g, const T* a) const {
    const T* const three[3] = {g - 1, g, g + 1};
    const T* const five[5] = {a - 2, a - 1, a, a + 1, a + 2};
    return route<T, kMax>(three, five, 0);
  }

  // Shares plane z of X_i, in `g_`, out among the axes along which x_{i−1} was least.
  void split(int64_t i, int64_t z) {
    const Ring<T>& eroded = x_[i - 1];
    const T* plane = eroded.plane(z);
    const T* before = z > 0 ? eroded.plane(z - 1) : plane;
    const T* after = inside(z + 1) ? eroded.plane(z + 1) : plane;
    T *to_z = along_z_[i].plane(z), *to = within_[i].plane(z);
    for (int64_t y = 0; y < rows(); ++y) {
      const int64_t row = y * pitch_;
      const T* own = plane + row;
      const T* left = y > 0 ? own - pitch_ : own;
      const T* right = y + 1 < rows() ? own + pitch_ : own;
      const T* line = lined(own, line_, high_[0]);
      each([&](int64_t x) {
        const Vec<T> c = load<T>(own + x), g = load<T>(g_ + row + x);
        const Vec<T> by_x = smaller(smaller(load<T>(line + x - 1), load<T>(line + x + 1)), c);
        const Vec<T> by_y = smaller(smaller(load<T>(left + x), load<T>(right + x)), c);
        const Vec<T> by_z =
            smaller(smaller(load<T>(before + row + x), load<T>(after + row + x)), c);
        Vec<T> of_z = splat<T>(T(0)), of_y = of_z, of_x = g;
        if (job_.has_y) {
          share(smaller(by_z, by_y), by_x, g, of_z, of_x);
          share(by_z, by_y, Vec<T>(of_z), of_z, of_y);
        } else if (job_.has_z) {
          share(by_z, by_x, g, of_z, of_x);
        }
        store<T>(to_z + row + x, of_z);
        store<T>(h_ + row + x, of_y);
        store<T>(out_row_ + x, of_x);
      });
      const T* from = lined(out_row_, line_of_g_, T(0));
      each([&](int64_t x) { store<T>(to + row + x, route_in_line<false>(from + x, line + x)); });
    }
    if (!job_.has_y) return;
    for (int64_t y = 0; y < rows(); ++y) {
      const T *a[5], *g[5];
      along(plane, y, high_, a);
      along(h_, y, zero_, g);
      const T* const three[3] = {g[1], g[2], g[3]};
      T* row = to + y * pitch_;
      each([&](int64_t x) { store<T>(row + x, load<T>(row + x) + route<T, false>(three, a, x)); });
    }
  }
  // g goes to the lesser of two, or to both by half.
  FL_INLINE static void share(Vec<T> a, Vec<T> b, Vec<T> g, Vec<T>& to_a, Vec<T>& to_b) {
    const Vec<T> both = keep<T>(a == b, T(0.5) * g);
    to_a = keep<T>(a < b, g) + both;
    to_b = keep<T>(b < a, g) + both;
  }

  void write(int64_t z) {
    if (z < first_ || z >= last_) return;
    for (int64_t y = 0; y < rows(); ++y) save(z, y, g_ + y * pitch_);
  }
};

size_t skeleton_bytes(const SkeletonJob& job) {
  const bool wide = job.dtype == DType::f64;
  return wide ? Wave<double>(job, nullptr).bytes() : Wave<float>(job, nullptr).bytes();
}

void skeleton_part(const SkeletonJob& job, int64_t channel, int64_t first, int64_t last,
                   void* memory) {
  if (job.dtype == DType::f64) Wave<double>(job, memory).run(channel, first, last);
  else Wave<float>(job, memory).run(channel, first, last);
}

}  // namespace

#define FASTLOSS_JOIN_(a, b) a##b
#define FASTLOSS_JOIN(a, b) FASTLOSS_JOIN_(a, b)
#define FASTLOSS_TEXT_(a) #a
#define FASTLOSS_TEXT(a) FASTLOSS_TEXT_(a)

namespace fastloss {
extern const SkeletonKernels FASTLOSS_JOIN(skeleton_kernels_, FASTLOSS_ISA);
const SkeletonKernels FASTLOSS_JOIN(skeleton_kernels_, FASTLOSS_ISA) = {
    FASTLOSS_TEXT(FASTLOSS_ISA), skeleton_bytes, skeleton_part};
}  // namespace fastloss
