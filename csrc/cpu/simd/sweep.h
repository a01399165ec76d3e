// A panel of the symmetric sweep of csrc/README.md, (7). Included by kernels.cpp.

template <typename T>
void combine(T a, const T* x, T b, const T* y, T* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = a * x[i] + b * y[i];
}

// Clamps c_i so that c_i^2 <= pivot * a_ii, which holds for any positive semidefinite matrix.
// Returns how many rows violated it by more than `floor`.
template <typename T>
int cut_column(T pivot, T* c, const T* diagonal, int64_t begin, int64_t end, T floor) {
  int violations = 0, beyond = 0;
  for (int64_t i = begin; i < end; ++i) {
    const T square = c[i] * c[i];
    violations += square > pivot * (diagonal[i] < floor ? floor : diagonal[i]);
    beyond += square > pivot * (diagonal[i] < 0 ? T(0) : diagonal[i]);
  }
  if (beyond == 0) return 0;
  for (int64_t i = begin; i < end; ++i) {
    const T limit = pivot * (diagonal[i] < 0 ? T(0) : diagonal[i]);
    if (c[i] * c[i] > limit) c[i] = std::copysign(std::sqrt(limit), c[i]);
  }
  return violations;
}

// Applies each pivot to the whole panel before it reads the next one. To multiply with an inverse
// of the pivot block would save half of the work, but its rounding is of the order of 1 / floor,
// and all accuracy would be lost where A is rank deficient.
template <typename T>
int64_t sweep_panel(T* panel, T* diagonal, T* c, T* y, int64_t size, int64_t m, int64_t first,
                    T floor) {
  int64_t repaired = 0;
  for (int64_t k = 0; k < size; ++k) {
    T* column = panel + k * m;
    T* c_k = c + k * m;
    T* y_k = y + k * m;
    const T pivot = column[first + k] < floor ? floor : column[first + k];
    const int cut = cut_column(pivot, column, diagonal, first + k + 1, m, floor);
    repaired += pivot != column[first + k] || cut > 0;
    const T inverse = T(1) / pivot;
    for (int64_t i = 0; i < m; ++i) {
      c_k[i] = column[i];
      column[i] *= inverse;
      y_k[i] = -column[i];
      diagonal[i] += y_k[i] * c_k[i];
    }
    for (int64_t j = 0; j < size; ++j) {
      if (j == k) continue;
      combine(T(1), panel + j * m, y_k[first + j], c_k, panel + j * m, m);
      panel[j * m + first + k] = column[first + j];
    }
    column[first + k] = -inverse;
  }
  return repaired;
}
