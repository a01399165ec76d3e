// Tiles of a product, and the packing of its right operand. Included by kernels.cpp.

// A tile of exactly kRows rows and at most kVectors vectors of columns, its accumulators in
// registers for the whole of k.
template <typename T, int kRows, int kVectors>
void multiply_rows(int64_t k, MatrixView<T> a, const T* packed_b, T* c, int64_t c_stride, int cols,
                   bool accumulate) {
  using V = typename Vector<T>::Type;
  constexpr int kWidth = Vector<T>::kSize, kCols = kVectors * kWidth;
  V sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kVectors; ++p) sum[r][p] = V{};
  }
  for (int64_t i = 0; i < k; ++i) {
    V b[kVectors];
    for (int p = 0; p < kVectors; ++p) b[p] = load(packed_b + p * kWidth);
    const T* column = a.data + i * a.col_stride;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kVectors; ++p) sum[r][p] += column[r * a.row_stride] * b[p];
    }
    packed_b += kTileCols<T>;
  }
  if (cols == kCols) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kVectors; ++p) {
        T* to = c + r * c_stride + p * kWidth;
        store(to, accumulate ? load(to) + sum[r][p] : sum[r][p]);
      }
    }
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    T tile[kCols];
    for (int p = 0; p < kVectors; ++p) store(tile + p * kWidth, sum[r][p]);
    T* row = c + r * c_stride;
    for (int j = 0; j < cols; ++j) row[j] = accumulate ? row[j] + tile[j] : tile[j];
  }
}

// multiply_rows by number of rows, up to kTileRows. Constant: the compiler makes the calls.
template <typename T, int kVectors, int kRows = kTileRows>
void multiply_columns(int64_t k, MatrixView<T> a, const T* packed_b, T* c, int64_t c_stride,
                      int rows, int cols, bool accumulate) {
  if (rows == kRows) {
    multiply_rows<T, kRows, kVectors>(k, a, packed_b, c, c_stride, cols, accumulate);
  } else if constexpr (kRows > 1) {
    multiply_columns<T, kVectors, kRows - 1>(k, a, packed_b, c, c_stride, rows, cols, accumulate);
  }
}

template <typename T>
void multiply_tile(int64_t k, MatrixView<T> a, const T* packed_b, T* c, int64_t c_stride, int rows,
                   int cols, bool accumulate) {
  const auto columns = cols <= Vector<T>::kSize ? multiply_columns<T, 1> : multiply_columns<T, 2>;
  columns(k, a, packed_b, c, c_stride, rows, cols, accumulate);
}

// Exchanges the lanes of a that have the bit kBit with those of b that lack it.
template <int kBit, typename V, int... kLanes>
void exchange(V& a, V& b, Lanes<kLanes...>) {
  constexpr int kSize = sizeof...(kLanes);
  const V first = shuffled<((kLanes & kBit) != 0 ? kSize + kLanes - kBit : kLanes)...>(a, b);
  b = shuffled<((kLanes & kBit) != 0 ? kSize + kLanes : kLanes + kBit)...>(a, b);
  a = first;
}

// Transposes as many rows as a vector has lanes.
template <typename T, int kBit = Vector<T>::kSize / 2>
void transpose(typename Vector<T>::Type* row) {
  constexpr int kSize = Vector<T>::kSize;
#pragma GCC unroll 16
  for (int r = 0; r < kSize; ++r) {
    if ((r & kBit) == 0) exchange<kBit>(row[r], row[r + kBit], typename FirstLanes<kSize>::Type{});
  }
  if constexpr (kBit > 1) transpose<T, kBit / 2>(row);
}

// A column of B, contiguous, is a row of what a vector's lanes are read from.
template <typename T>
void pack_transposed(int64_t k, int cols, const T* b, int64_t col_stride, T* packed) {
  constexpr int kWidth = Vector<T>::kSize, kCols = kTileCols<T>;
  for (int from = 0; from < kCols; from += kWidth) {
    const int count = cols - from < kWidth ? cols - from : kWidth;
    for (int64_t i = 0; i < k; i += kWidth) {
      typename Vector<T>::Type block[kWidth];
      if (i + kWidth <= k && count == kWidth) {
#pragma GCC unroll 16
        for (int j = 0; j < kWidth; ++j) block[j] = load(b + (from + j) * col_stride + i);
        transpose<T>(block);
#pragma GCC unroll 16
        for (int j = 0; j < kWidth; ++j) store(packed + (i + j) * kCols + from, block[j]);
        continue;
      }
      for (int64_t l = i; l < i + kWidth && l < k; ++l) {
        T* row = packed + l * kCols + from;
        for (int j = 0; j < count; ++j) row[j] = b[(from + j) * col_stride + l];
        for (int j = count < 0 ? 0 : count; j < kWidth; ++j) row[j] = T(0);
      }
    }
  }
}

template <typename T>
void pack(int64_t k, int cols, MatrixView<T> b, const T* row_scale, T* packed) {
  constexpr int kCols = kTileCols<T>;
  if (b.col_stride == 1 && cols == kCols) {
    for (int64_t i = 0; i < k; ++i) {
      const T* row = b.data + i * b.row_stride;
      const T factor = row_scale ? row_scale[i] : T(1);
      for (int j = 0; j < kCols; j += Vector<T>::kSize)
        store(packed + i * kCols + j, factor * load(row + j));
    }
    return;
  }
  if (b.row_stride == 1 && !row_scale)
    return pack_transposed(k, cols, b.data, b.col_stride, packed);
  for (int64_t i = 0; i < k; ++i) {
    const T factor = row_scale ? row_scale[i] : T(1);
    const T* row = b.data + i * b.row_stride;
    for (int j = 0; j < cols; ++j) packed[i * kCols + j] = factor * row[j * b.col_stride];
    for (int j = cols; j < kCols; ++j) packed[i * kCols + j] = T(0);
  }
}

template <typename T>
void mirror_lower(T* c, int64_t size) {
  constexpr int kWidth = Vector<T>::kSize;
  for (int64_t i = 0; i < size; i += kWidth) {
    const int64_t end = i + kWidth < size ? i + kWidth : size;
    int64_t j = 0;
    for (; j < i && end == i + kWidth; j += kWidth) {
      typename Vector<T>::Type block[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) block[r] = load(c + (i + r) * size + j);
      transpose<T>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) store(c + (j + r) * size + i, block[r]);
    }
    for (; j < end; ++j) {
      for (int64_t l = j < i ? i : j + 1; l < end; ++l) c[j * size + l] = c[l * size + j];
    }
  }
}
