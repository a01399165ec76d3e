// The reduction of a band to a tridiagonal matrix. Included by kernels.cpp.

// Sixteen numbers in registers: a row of a block of the band.
struct BandRow {
  using V = Vector<double>::Type;
  static constexpr int kWidth = Vector<double>::kSize, kCount = kBand / kWidth;
  V part[kCount];

  static BandRow zero() {
    BandRow row;
    for (V& part : row.part) part = V{};
    return row;
  }
  static BandRow from(const double* at) {
    BandRow row;
    for (int c = 0; c < kCount; ++c) row.part[c] = load(at + c * kWidth);
    return row;
  }
  void to(double* at) const {
    for (int c = 0; c < kCount; ++c) store(at + c * kWidth, part[c]);
  }
  void add(double factor, const BandRow& other) {
    for (int c = 0; c < kCount; ++c) part[c] += factor * other.part[c];
  }
  double dot(const BandRow& other) const {
    V sum = part[0] * other.part[0];
    for (int c = 1; c < kCount; ++c) sum += part[c] * other.part[c];
    return sum_of<double>(sum);
  }
};

// Finds v, with v_0 = 1, and tau so that I - tau v v^T maps x to (beta, 0, ...); returns beta.
// Squares that would not be exact are left out, as the trace is one.
double reflector(const double* x, double* v, double* tau) {
  constexpr double kNegligible = 1e-290;
  const BandRow row = BandRow::from(x);
  row.to(v);
  const double alpha = x[0];
  v[0] = 0;
  const BandRow others = BandRow::from(v);
  const double rest = others.dot(others);
  if (!(rest > kNegligible)) {
    BandRow::zero().to(v);
    v[0] = 1;
    *tau = 0;
    return alpha;
  }
  const double norm = std::sqrt(alpha * alpha + rest), beta = alpha > 0 ? -norm : norm;
  const double factor = 1 / (alpha - beta);
  BandRow scaled = BandRow::zero();
  scaled.add(factor, others);
  scaled.to(v);
  v[0] = 1;
  *tau = (beta - alpha) / beta;
  return beta;
}

// D <- H D H for the symmetric D [kBand, kBand] of a row stride, H = I - tau v v^T.
void reflect_block(double* d, int64_t stride, const double* v, double tau) {
  BandRow even = BandRow::zero(), odd = BandRow::zero();
  for (int r = 0; r < kBand; r += 2) {
    even.add(v[r], BandRow::from(d + r * stride));
    odd.add(v[r + 1], BandRow::from(d + (r + 1) * stride));
  }
  even.add(1, odd);  // D v
  const BandRow of_v = BandRow::from(v);
  BandRow w = BandRow::zero();
  w.add(tau, even);
  w.add(-tau * tau / 2 * even.dot(of_v), of_v);
  double entries[kBand];
  w.to(entries);
  for (int r = 0; r < kBand; ++r) {
    BandRow row = BandRow::from(d + r * stride);
    row.add(-v[r], w);
    row.add(-entries[r], of_v);
    row.to(d + r * stride);
  }
}

// E <- H E H' for the block E to the right of D. H' makes the first row of H E zero beyond its
// first entry. Its v and tau replace those of H.
void chase_block(double* e, int64_t stride, double* v, double* tau) {
  BandRow even = BandRow::zero(), odd = BandRow::zero();
  for (int r = 0; r < kBand; r += 2) {
    even.add(v[r], BandRow::from(e + r * stride));
    odd.add(v[r + 1], BandRow::from(e + (r + 1) * stride));
  }
  even.add(1, odd);  // v^T E
  BandRow first = BandRow::from(e);
  first.add(-*tau, even);
  double row_0[kBand], next[kBand], next_tau;
  first.to(row_0);
  const double beta = reflector(row_0, next, &next_tau);
  BandRow::zero().to(e);
  e[0] = beta;
  const BandRow of_next = BandRow::from(next);
  for (int r = 1; r < kBand; ++r) {
    BandRow row = BandRow::from(e + r * stride);
    row.add(-*tau * v[r], even);
    row.add(-next_tau * row.dot(of_next), of_next);
    row.to(e + r * stride);
  }
  of_next.to(v);
  *tau = next_tau;
}

void tridiagonalize_band(double* band, int64_t m, double* diagonal, double* off_diagonal) {
  constexpr int64_t kOn = kBand - 1;         // where the diagonal is in a row
  constexpr int64_t kStride = kBandRow - 1;  // from a row of a block to the next one
  for (int64_t k = 0; k < m; ++k) {
    double* row = band + k * kBandRow + kOn;
    diagonal[k] = row[0];
    if (k + 1 == m) return;
    double v[kBand], tau;
    off_diagonal[k] = reflector(row + 1, v, &tau);
    for (int64_t first = k + 1; first < m; first += kBand) {
      double* d = band + first * kBandRow + kOn;
      reflect_block(d, kStride, v, tau);
      if (first + kBand >= m) break;
      double* e = d + kBand;
      chase_block(e, kStride, v, &tau);
      // The first column of E is a row of the next step's D.
      double* mirrored = d + kBand * kStride;
      for (int r = 1; r < kBand; ++r) mirrored[r] = e[r * kStride];
    }
  }
}
