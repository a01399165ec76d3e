// Householder's reduction, and products with a few rows at a time. Included by kernels.cpp.

template <int kRows>
void reflect_rows(float* a, int64_t stride, int64_t i, int64_t first, const float* v,
                  const float* w, const float* next, float* y) {
  using V = typename Vector<float>::Type;
  constexpr int kWidth = Vector<float>::kSize;
  static_assert(kPadding % kWidth == 0);
  V sum[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = V{};
  float* row = a + i * stride;
  for (int64_t j = first / kWidth * kWidth; j < stride; j += kWidth) {
    const V v_j = load(v + j), w_j = load(w + j), next_j = load(next + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V entry = load(row + r * stride + j) - v[i + r] * w_j - w[i + r] * v_j;
      store(row + r * stride + j, entry);
      sum[r] += entry * next_j;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float total = 0;
    for (int lane = 0; lane < kWidth; ++lane) total += sum[r][lane];
    y[i + r] = total;
  }
}

void reflect(float* a, int64_t stride, int64_t begin, int64_t end, int64_t first, const float* v,
             const float* w, const float* next, float* y) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) reflect_rows<4>(a, stride, i, first, v, w, next, y);
  for (; i < end; ++i) reflect_rows<1>(a, stride, i, first, v, w, next, y);
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

// Takes kRows rows at a time, to load x and y once for all of them.
template <typename T, int kRows>
void symmetric_multiply_rows(const T* a, int64_t stride, int64_t i, int64_t end, const T* x, T* y) {
  using V = typename Vector<T>::Type;
  constexpr int kWidth = Vector<T>::kSize;
  const T* row = a + i * stride;
  T own[kRows] = {};
  for (int r = 0; r < kRows; ++r) {
    own[r] += row[r * stride + i + r] * x[i + r];
    for (int c = r + 1; c < kRows; ++c) {
      own[r] += row[r * stride + i + c] * x[i + c];
      own[c] += row[r * stride + i + c] * x[i + r];
    }
  }
  V sum[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = V{};
  int64_t j = i + kRows;
  for (; j + kWidth <= end; j += kWidth) {
    const V x_j = load(x + j);
    V y_j = load(y + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V entry = load(row + r * stride + j);
      sum[r] += entry * x_j;
      y_j += entry * x[i + r];
    }
    store(y + j, y_j);
  }
  for (; j < end; ++j) {
    for (int r = 0; r < kRows; ++r) {
      own[r] += row[r * stride + j] * x[j];
      y[j] += row[r * stride + j] * x[i + r];
    }
  }
  for (int r = 0; r < kRows; ++r) y[i + r] += own[r] + sum_of<T>(sum[r]);
}

template <typename T>
void symmetric_multiply(const T* a, int64_t stride, int64_t begin, int64_t end, const T* x, T* y) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) symmetric_multiply_rows<T, 4>(a, stride, i, end, x, y);
  for (; i < end; ++i) symmetric_multiply_rows<T, 1>(a, stride, i, end, x, y);
}

template <typename T, int kRows>
void dots_of_rows(const T* rows, int64_t stride, int64_t begin, int64_t end, const T* x, T* dots) {
  using V = typename Vector<T>::Type;
  constexpr int kWidth = Vector<T>::kSize;
  V sum[kRows];
  T rest[kRows] = {};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = V{};
  int64_t j = begin;
  for (; j + kWidth <= end; j += kWidth) {
    const V x_j = load(x + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r] += load(rows + r * stride + j) * x_j;
  }
  for (; j < end; ++j) {
    for (int r = 0; r < kRows; ++r) rest[r] += rows[r * stride + j] * x[j];
  }
  for (int r = 0; r < kRows; ++r) dots[r] = rest[r] + sum_of<T>(sum[r]);
}

template <typename T>
void dots(const T* rows, int64_t stride, int64_t count, int64_t begin, int64_t end, const T* x,
          T* dots) {
  int64_t l = 0;
  for (; l + 4 <= count; l += 4)
    dots_of_rows<T, 4>(rows + l * stride, stride, begin, end, x, dots + l);
  for (; l < count; ++l) dots_of_rows<T, 1>(rows + l * stride, stride, begin, end, x, dots + l);
}

template <typename T, int kRows>
void add_few_rows(const T* rows, int64_t stride, int64_t begin, int64_t end, const T* f, T* y) {
  constexpr int kWidth = Vector<T>::kSize;
  int64_t j = begin;
  for (; j + kWidth <= end; j += kWidth) {
    typename Vector<T>::Type y_j = load(y + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) y_j += f[r] * load(rows + r * stride + j);
    store(y + j, y_j);
  }
  for (; j < end; ++j) {
    for (int r = 0; r < kRows; ++r) y[j] += f[r] * rows[r * stride + j];
  }
}

template <typename T>
void add_rows(const T* rows, int64_t stride, int64_t count, int64_t begin, int64_t end, const T* f,
              T* y) {
  int64_t l = 0;
  for (; l + 4 <= count; l += 4)
    add_few_rows<T, 4>(rows + l * stride, stride, begin, end, f + l, y);
  for (; l < count; ++l) add_few_rows<T, 1>(rows + l * stride, stride, begin, end, f + l, y);
}
