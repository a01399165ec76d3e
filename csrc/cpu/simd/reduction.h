// Householder's reduction, and products with a few rows at a time. Included by kernels.cpp.

// Rows of one block on the diagonal, of as many rows as a vector has lanes. Such blocks are whole.
template <int kRows>
void reflect_rows(float* a, int64_t stride, int64_t i, const float* v, const float* w,
                  const float* next, float* y) {
  using V = typename Vector<float>::Type;
  constexpr int kWidth = Vector<float>::kSize;
  static_assert(kPadding % kWidth == 0);
  V sum[kRows], v_i[kRows], w_i[kRows], next_i[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    v_i[r] = v[i + r] - V{};
    w_i[r] = w[i + r] - V{};
    next_i[r] = next[i + r] - V{};
  }
  float* row = a + i * stride;
  const auto update = [&](int64_t j, int r, V v_j, V w_j) {
    const V entry = load(row + r * stride + j) - v_i[r] * w_j - w_i[r] * v_j;
    store(row + r * stride + j, entry);
    return entry;
  };
  int64_t j = i / kWidth * kWidth;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = update(j, r, load(v + j), load(w + j)) * load(next + j);
  for (j += kWidth; j < stride; j += kWidth) {
    const V v_j = load(v + j), w_j = load(w + j), next_j = load(next + j);
    V y_j = load(y + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V entry = update(j, r, v_j, w_j);
      sum[r] += entry * next_j;
      y_j += entry * next_i[r];
    }
    store(y + j, y_j);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) y[i + r] += sum_of<float>(sum[r]);
}

void reflect(float* a, int64_t stride, int64_t begin, int64_t end, const float* v, const float* w,
             const float* next, float* y) {
  constexpr int kWidth = Vector<float>::kSize;
  static_assert(kWidth % 4 == 0);
  for (int64_t j = begin / kWidth * kWidth; j < stride; ++j) y[j] = 0;
  int64_t i = begin;
  for (; i < end && i % 4 != 0; ++i) reflect_rows<1>(a, stride, i, v, w, next, y);
  for (; i + 4 <= end; i += 4) reflect_rows<4>(a, stride, i, v, w, next, y);
  for (; i < end; ++i) reflect_rows<1>(a, stride, i, v, w, next, y);
}

void next_pivots(int poles, double diagonal, const double* t, double square, double* pivot) {
  for (int k = 0; k < poles; ++k) pivot[k] = diagonal + t[k] - square / pivot[k];
}

void advance(int poles, const float* ratio, float* running, int64_t stride, float* row,
             int64_t size) {
  using V = typename Vector<float>::Type;
  constexpr float kTooSmall = 1e-20F;
  for (int64_t i = 0; i < size; i += Vector<float>::kSize) {
    V sum = load(row + i);
    for (int k = 0; k < poles; ++k) {
      V entry = ratio[k] * load(running + k * stride + i);
      entry = ((entry > kTooSmall) | (entry < -kTooSmall)) ? entry : V{};
      store(running + k * stride + i, entry);
      sum += entry;
    }
    store(row + i, sum);
  }
}

// The last steps' reflectors of a matrix being reduced, each [kParts, stride]: what
// `reflect_hermitian` works with.
template <typename T>
struct Reflectors {
  const T *v, *w, *next;
  T* y;
};

// A row [kParts, stride] is the real parts, then the imaginary parts if kParts is 2. Blocks of so
// many rows and columns on the diagonal are stored whole.
template <typename T>
constexpr int kOnDiagonal = Vector<T>::kSize < 4 ? 4 : Vector<T>::kSize;

// a_ij -= conj(v_i) w_j + conj(w_i) v_j for the rows i .. i + kRows, which one block holds; then
// y += a next, where a_ij beyond the block counts as conj(a_ji) too.
template <typename T, int kParts, int kRows>
void reflect_hermitian_rows(T* a, int64_t stride, int64_t i, int64_t end, const Reflectors<T>& of) {
  using V = typename Vector<T>::Type;
  constexpr int kWidth = Vector<T>::kSize;
  constexpr bool kComplex = kParts == 2;
  T* row = a + i * kParts * stride;
  V own[kRows][kParts];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    for (int part = 0; part < kParts; ++part) own[r][part] = V{};
  }
  const auto visit = [&](int64_t j, bool on_diagonal) __attribute__((always_inline)) {
    const V v = load(of.v + j), w = load(of.w + j), next = load(of.next + j);
    V y = load(of.y + j);
    [[maybe_unused]] V v_im, w_im, next_im, y_im;
    if constexpr (kComplex) {
      v_im = load(of.v + stride + j);
      w_im = load(of.w + stride + j);
      next_im = load(of.next + stride + j);
      y_im = load(of.y + stride + j);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      T* at = row + r * kParts * stride + j;
      const T v_r = of.v[i + r], w_r = of.w[i + r], next_r = of.next[i + r];
      V entry = load(at) - v_r * w - w_r * v;
      if constexpr (kComplex) {
        const T v_r_im = of.v[stride + i + r], w_r_im = of.w[stride + i + r];
        const T next_r_im = of.next[stride + i + r];
        entry = entry - v_r_im * w_im - w_r_im * v_im;
        const V entry_im = load(at + stride) - v_r * w_im + v_r_im * w - w_r * v_im + w_r_im * v;
        y = y + entry * next_r - entry_im * next_r_im;
        y_im = y_im + entry * next_r_im + entry_im * next_r;
        if (!on_diagonal) {
          own[r][0] = own[r][0] + entry * next + entry_im * next_im;
          own[r][1] = own[r][1] + entry * next_im - entry_im * next;
        }
        store(at + stride, entry_im);
      } else {
        y = y + entry * next_r;
        if (!on_diagonal) own[r][0] += entry * next;
      }
      store(at, entry);
    }
    store(of.y + j, y);
    if constexpr (kComplex) store(of.y + stride + j, y_im);
  };
  int64_t j = i / kOnDiagonal<T> * kOnDiagonal<T>;
  const int64_t beyond = j + kOnDiagonal<T>;
  for (; j < beyond; j += kWidth) visit(j, true);
  if (beyond >= end) return;
  for (; j < end; j += kWidth) visit(j, false);
  for (int part = 0; part < kParts; ++part) {
    for (int r = 0; r < kRows; ++r) of.y[part * stride + i + r] += sum_of<T>(own[r][part]);
  }
}

// The rows from `begin` to `end`.
template <typename T, int kParts>
void reflect_hermitian(T* a, int64_t m, int64_t stride, int64_t begin, int64_t end,
                       const Reflectors<T>& of) {
  constexpr int kRows = kParts == 2 ? 2 : 4;
  constexpr int64_t kWidth = Vector<T>::kSize;
  const int64_t cols = (m + kWidth - 1) / kWidth * kWidth;
  for (int64_t i = begin; i < end;) {
    const int64_t block = (i / kOnDiagonal<T> + 1) * kOnDiagonal<T>;
    const int64_t last = block < end ? block : end;
    for (; i + kRows <= last; i += kRows)
      reflect_hermitian_rows<T, kParts, kRows>(a, stride, i, cols, of);
    for (; i < last; ++i) reflect_hermitian_rows<T, kParts, 1>(a, stride, i, cols, of);
  }
}

// All rows from `begin` on, shared out over threads where they are many. Each of the kShares parts
// has a y, and one range of long and one of short rows.
template <typename T, int kParts>
struct Pass {
  T* a;
  int64_t m, stride, begin, from;
  Reflectors<T> of;

  void run(Share share) const {
    constexpr int64_t kMany = 512;  // from there on it takes less time than to wake threads
    if (m - begin < kMany) {
      clear(of.y);
      return reflect_hermitian<T, kParts>(a, m, stride, begin, m, of);
    }
    const auto body = [](const void* pass, int64_t item) {
      static_cast<const Pass*>(pass)->part(item);
    };
    share(kShares, body, this);
    for (int64_t item = 1; item < kShares; ++item) {
      for (int part = 0; part < kParts; ++part) {
        T* sum = of.y + part * stride;
        const T* other = sum + item * kParts * stride;
        for (int64_t j = from; j < stride; ++j) sum[j] += other[j];
      }
    }
  }

 private:
  void clear(T* y) const {
    for (int part = 0; part < kParts; ++part) {
      for (int64_t j = from; j < stride; ++j) y[part * stride + j] = 0;
    }
  }
  void part(int64_t item) const {
    Reflectors<T> own = of;
    own.y += item * kParts * stride;
    clear(own.y);
    const auto bound = [&](int64_t range) { return begin + (m - begin) * range / (2 * kShares); };
    reflect_hermitian<T, kParts>(a, m, stride, bound(item), bound(item + 1), own);
    const int64_t other = 2 * kShares - 1 - item;
    reflect_hermitian<T, kParts>(a, m, stride, bound(other), bound(other + 1), own);
  }
};

template <typename T, int kParts>
void tridiagonalize(T* a, int64_t m, int64_t stride, double negligible, Share share, T* work,
                    double* diagonal, double* off_diagonal) {
  constexpr double kTooSmall = sizeof(T) == 8 ? 1e-290 : 1e-74;  // to divide by its square root
  constexpr int64_t kSteps = 16;                                 // between looks at what is left
  T *v = work, *w = v + kParts * stride, *next = w + kParts * stride, *y = next + kParts * stride;
  for (int64_t j = 0; j < (3 + kShares) * kParts * stride; ++j) work[j] = 0;
  const auto zero = [&](T* x, int64_t from, int64_t to) {
    for (int part = 0; part < kParts; ++part) {
      for (int64_t j = from; j < to; ++j) x[part * stride + j] = 0;
    }
  };
  for (int64_t k = 0; k < m; ++k) {
    T* row = a + k * kParts * stride;
    diagonal[k] = row[k];
    if (k + 1 == m) return;

    // next: I - next next^H makes the row zero beyond its entry k + 1
    const int64_t from = (k + 1) / kPadding * kPadding, size = stride - from;
    double square_alpha = 0, rest = 0;
    for (int part = 0; part < kParts; ++part) {
      T* x = next + part * stride;
      for (int64_t j = from; j < stride; ++j) x[j] = row[part * stride + j];
      for (int64_t j = from; j <= k + 1; ++j) x[j] = 0;
      const double alpha = row[part * stride + k + 1];
      square_alpha += alpha * alpha;
      rest += dot(x + from, x + from, size);
    }
    const double norm = std::sqrt(square_alpha + rest);
    off_diagonal[k] = norm;
    if (rest > kTooSmall) {
      const double alpha = std::sqrt(square_alpha), factor = 1 / std::sqrt(norm * (norm + alpha));
      for (int part = 0; part < kParts; ++part) {
        T* x = next + part * stride;
        scale(x + from, static_cast<T>(factor), x + from, size);
        const double direction = alpha > 0 ? row[part * stride + k + 1] / alpha : part == 0;
        x[k + 1] = static_cast<T>(factor * direction * (alpha + norm));
      }
    } else {
      zero(next, from, stride);
    }

    // y = a next, then w
    Pass<T, kParts>{a, m, stride, k + 1, from, {v, w, next, y}}.run(share);
    zero(y, from, k + 1);
    double half = 0;
    for (int part = 0; part < kParts; ++part)
      half += dot(next + part * stride + from, y + part * stride + from, size) / 2;
    for (int part = 0; part < kParts; ++part) {
      for (int64_t j = part * stride + from; j < (part + 1) * stride; ++j)
        w[j] = y[j] - static_cast<T>(half) * next[j];
    }
    T* made = next;
    next = v;
    v = made;

    // the row that the next reflector is made of, as the pass above will not reach it
    row += kParts * stride;
    T of_w[2] = {}, of_v[2] = {};
    for (int part = 0; part < kParts; ++part) {
      of_v[part] = v[part * stride + k + 1];
      of_w[part] = w[part * stride + k + 1];
    }
    for (int64_t j = from; j < stride; ++j) row[j] -= of_v[0] * w[j] + of_w[0] * v[j];
    if constexpr (kParts == 2) {
      const T *v_im = v + stride, *w_im = w + stride;
      T* row_im = row + stride;
      for (int64_t j = from; j < stride; ++j) {
        row[j] -= of_v[1] * w_im[j] + of_w[1] * v_im[j];
        row_im[j] -= of_v[0] * w_im[j] - of_v[1] * w[j] + of_w[0] * v_im[j] - of_w[1] * v[j];
      }
    }

    if ((k + 1) % kSteps != 0 || k + 2 >= m) continue;
    double left = 0;  // the squares of the diagonal of the rest
    for (int64_t i = k + 2; i < m; ++i) {
      double entry = a[i * kParts * stride + i];
      for (int part = 0; part < kParts; ++part)
        entry -= 2.0 * v[part * stride + i] * w[part * stride + i];
      left += entry * entry;
    }
    if (left > negligible) continue;
    zero(next, from, stride);
    Pass<T, kParts>{a, m, stride, k + 2, from, {v, w, next, y}}.run(share);
    zero(v, from, stride);
    zero(w, from, stride);
    left = 0;
    for (int64_t i = k + 1; i < m; ++i) {
      for (int part = 0; part < kParts; ++part) {
        const T* x = a + (i * kParts + part) * stride;
        left += x[i] * x[i] + 2 * dot(x + i + 1, x + i + 1, m - i - 1);
      }
    }
    if (left > negligible) continue;
    for (int64_t i = k + 1; i < m; ++i) {
      diagonal[i] = a[i * kParts * stride + i];
      if (i + 1 < m) off_diagonal[i] = 0;
    }
    return;
  }
}
