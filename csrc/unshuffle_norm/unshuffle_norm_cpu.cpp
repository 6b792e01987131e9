// SPDX-License-Identifier: Apache-2.0
// One window at a time: it comes from memory once, and all further passes over it read the cache.
// So the variance is the mean of the centred squares, as exact as a second pass can make it.
#include <type_traits>

#include "common/blocked_sum.h"
#include "common/sums.h"
#include "common/vec.h"
#include "unshuffle_norm/unshuffle_norm.h"

namespace uhd {
namespace UHD_ISA {
namespace {

// The token in each slot of a window; a slot without one repeats the nearest token.
template <class T>
class SlotRows {
 public:
  SlotRows(const UnshuffleNorm& args, const Window& window)
      : x_(static_cast<const T*>(args.x)),
        stride_(args.x_stride),
        side_(args.views.window),
        window_(window) {}

  const T* operator[](int64_t slot) const {
    const int64_t r = slot / side_, c = slot % side_;
    return token(r < window_.rows ? r : window_.rows - 1, c < window_.cols ? c : window_.cols - 1);
  }
  const T* token(int64_t r, int64_t c) const {
    return x_ + (window_.first + r * window_.row_stride + c) * stride_;
  }

 private:
  const T* x_;
  int64_t stride_, side_;
  Window window_;
};

// Calls body(first slot, number of slots) with groups of four slots, then single ones. Four
// independent sums keep the adders busy.
template <class Body>
void for_slot_groups(int64_t slots, Body&& body) {
  int64_t slot = 0;
  for (; slot + 4 <= slots; slot += 4) body(slot, std::integral_constant<int, 4>{});
  for (; slot < slots; ++slot) body(slot, std::integral_constant<int, 1>{});
}

template <class S>
S sum_lanes(Vec<S> v) {
  S sum = 0;
  for (int i = 0; i < kLanes<S>; ++i) sum += v[i];
  return sum;
}

// ---- forward

// Sum over all slots and channels of term(value), value being zero past the last channel.
template <class T, class Term>
AccumulateT<T> sum_window(const UnshuffleNorm& args, const SlotRows<T>& x, Term&& term) {
  using S = AccumulateT<T>;
  Vec<S> total = {};
  for_slot_groups(args.views.window * args.views.window, [&](int64_t slot, auto rows) {
    const T* row[rows.value];
    Vec<S> sums[rows.value] = {};
    for (int i = 0; i < rows.value; ++i) row[i] = x[slot + i];
    for_channels<T>(args.channels, [&](int64_t c, auto load, auto) {
      for (int i = 0; i < rows.value; ++i) sums[i] += term(load(row[i] + c), load);
    });
    for (const Vec<S>& sum : sums) total += sum;
  });
  return sum_lanes<S>(total);
}

template <class T>
void normalise(const UnshuffleNorm& args, const SlotRows<T>& x, AccumulateT<T> mean,
               AccumulateT<T> rstd, T* z) {
  using S = AccumulateT<T>;
  const S* weight = static_cast<const S*>(args.norm_weight);
  const S* bias = static_cast<const S*>(args.norm_bias);
  for (int64_t slot = 0; slot < args.views.window * args.views.window; ++slot) {
    const T* row = x[slot];
    const int64_t first = slot * args.channels;
    for_channels<T>(args.channels, [&](int64_t c, auto load, auto store) {
      Vec<S> value = (load(row + c) - mean) * rstd;
      if (weight) value *= load(weight + first + c);
      if (bias) value += load(bias + first + c);
      store(z + first + c, value);
    });
  }
}

template <class T>
void store_mean(const UnshuffleNorm& args, const SlotRows<T>& x, const Window& window, T* out) {
  using S = AccumulateT<T>;
  for_channels<T>(args.channels, [&](int64_t c, auto load, auto store) {
    BlockedSum<Vec<S>> sum;
    for (int64_t i = 0; i < window.rows; ++i) {
      for (int64_t j = 0; j < window.cols; ++j) sum.add(load(x.token(i, j) + c));
    }
    store(out + c, sum.total() / static_cast<S>(window.size()));
  });
}

template <class T>
void forward_window(const UnshuffleNorm& args, const Window& window, int64_t index) {
  using S = AccumulateT<T>;
  const SlotRows<T> x(args, window);
  const S count = static_cast<S>(args.merged_channels());
  const S mean = sum_window<T>(args, x, [](Vec<S> v, auto) { return v; }) / count;
  // Read through `load`, the mean is zero past the last channel, and so is the difference.
  S centre[kLanes<S>];
  store(centre, splat(mean));
  const S squares = sum_window<T>(args, x, [&](Vec<S> v, auto load) {
    const Vec<S> difference = v - load(centre);
    return difference * difference;
  });
  const S rstd = S(1) / std::sqrt(squares / count + static_cast<S>(args.eps));
  static_cast<S*>(args.mean)[index] = mean;
  static_cast<S*>(args.rstd)[index] = rstd;
  normalise(args, x, mean, rstd, static_cast<T*>(args.z) + index * args.merged_channels());
  if (args.residual) {
    store_mean(args, x, window, static_cast<T*>(args.residual) + index * args.channels);
  }
}

// ---- backward
// With n = (x - mean) * rstd and g = grad_z * weight, both over the K channels of the window:
//   grad_x = rstd * (g - mean(g) - n * mean(g n)), summed over the slots that a token fills.

template <class S>
struct Means {
  S g, gn;
};

// Also adds this window's grad_z n and grad_z to the two rows of `partial`, unless it is null.
template <class T, class S = AccumulateT<T>>
Means<S> backward_means(const UnshuffleNorm& args, const SlotRows<T>& x, S mean, S rstd,
                        const T* grad_z, S* partial) {
  const S* weight = static_cast<const S*>(args.norm_weight);
  S* partial_bias = partial ? partial + args.merged_channels() : nullptr;
  Vec<S> total_g = {}, total_gn = {};
  for_slot_groups(args.views.window * args.views.window, [&](int64_t slot, auto rows) {
    const T* row[rows.value];
    Vec<S> sum_g[rows.value] = {}, sum_gn[rows.value] = {};
    for (int i = 0; i < rows.value; ++i) row[i] = x[slot + i];
    for_channels<T>(args.channels, [&](int64_t c, auto load, auto store) {
      for (int i = 0; i < rows.value; ++i) {
        const int64_t k = (slot + i) * args.channels + c;
        const Vec<S> n = (load(row[i] + c) - mean) * rstd;
        Vec<S> g = load(grad_z + k);
        if (partial) {
          store(partial + k, load(partial + k) + g * n);
          store(partial_bias + k, load(partial_bias + k) + g);
        }
        if (weight) g *= load(weight + k);
        sum_g[i] += g;
        sum_gn[i] += g * n;
      }
    });
    for (int i = 0; i < rows.value; ++i) total_g += sum_g[i];
    for (int i = 0; i < rows.value; ++i) total_gn += sum_gn[i];
  });
  const S count = static_cast<S>(args.merged_channels());
  return {sum_lanes<S>(total_g) / count, sum_lanes<S>(total_gn) / count};
}

// Writes grad_x of the token at (r, c), which fills the slots [r, row_end) x [c, col_end).
template <class T, class S = AccumulateT<T>>
void backward_token(const UnshuffleNorm& args, const T* x, int64_t r, int64_t row_end, int64_t c,
                    int64_t col_end, S mean, S rstd, const Means<S>& means, const T* grad_z,
                    const T* grad_residual, S tokens, T* grad_x) {
  const S* weight = static_cast<const S*>(args.norm_weight);
  const S slots = static_cast<S>((row_end - r) * (col_end - c));
  for_channels<T>(args.channels, [&](int64_t channel, auto load, auto store) {
    Vec<S> g = {};
    for (int64_t i = r; i < row_end; ++i) {
      for (int64_t j = c; j < col_end; ++j) {
        const int64_t k = (i * args.views.window + j) * args.channels + channel;
        g += weight ? load(grad_z + k) * load(weight + k) : load(grad_z + k);
      }
    }
    const Vec<S> n = (load(x + channel) - mean) * rstd;
    Vec<S> grad = (g - (n * means.gn + means.g) * slots) * rstd;
    if (grad_residual) grad += load(grad_residual + channel) / tokens;
    store(grad_x + channel, grad);
  });
}

template <class T, class S = AccumulateT<T>>
void backward_window(const UnshuffleNorm& args, const Window& window, int64_t index, S* partial) {
  const SlotRows<T> x(args, window);
  const int64_t f = args.views.window;
  const S mean = static_cast<const S*>(args.mean)[index];
  const S rstd = static_cast<const S*>(args.rstd)[index];
  const T* grad_z = static_cast<const T*>(args.grad_z) + index * args.grad_z_stride;
  const T* grad_residual = static_cast<const T*>(args.grad_residual);
  if (grad_residual) grad_residual += index * args.grad_residual_stride;
  const Means<S> means = backward_means<T>(args, x, mean, rstd, grad_z, partial);
  for (int64_t r = 0; r < window.rows; ++r) {
    T* grad_row =
        static_cast<T*>(args.grad_x) + (window.first + r * window.row_stride) * args.channels;
    for (int64_t c = 0; c < window.cols; ++c) {
      // The last row and column of a ragged window also fill the slots beyond the view.
      backward_token<T>(args, x.token(r, c), r, r + 1 == window.rows ? f : r + 1, c,
                        c + 1 == window.cols ? f : c + 1, mean, rstd, means, grad_z, grad_residual,
                        static_cast<S>(window.size()), grad_row + c * args.channels);
    }
  }
}

template <class T, class S = AccumulateT<T>>
void backward_block(const UnshuffleNorm& args, int64_t block) {
  const int64_t begin = block * kWindowsPerBlock;
  const int64_t last = begin + kWindowsPerBlock, total = args.views.num_windows();
  const int64_t elements = 2 * args.merged_channels();
  S* partial = args.partials ? static_cast<S*>(args.partials) + block * elements : nullptr;
  if (partial) std::memset(partial, 0, static_cast<size_t>(elements) * sizeof(S));
  WindowCursor cursor(args.views, begin);
  for (int64_t i = begin; i < (last < total ? last : total); ++i) {
    backward_window<T>(args, cursor.next(), i, partial);
  }
}

}  // namespace

void unshuffle_norm_forward(const UnshuffleNorm& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    WindowCursor cursor(args.views, begin);
    for (int64_t i = begin; i < end; ++i) {
      forward_window<decltype(element)>(args, cursor.next(), i);
    }
  });
}

void unshuffle_norm_backward(const UnshuffleNorm& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    for (int64_t block = begin; block < end; ++block) {
      backward_block<decltype(element)>(args, block);
    }
  });
}

void unshuffle_norm_sum_partials(const UnshuffleNorm& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.views.num_windows() + kWindowsPerBlock - 1) / kWindowsPerBlock;
  dispatch_dtype(args.dtype, [&](auto element) {
    using S = AccumulateT<decltype(element)>;
    const int64_t merged = args.merged_channels(), count = end - begin;
    const S* partials = static_cast<const S*>(args.partials) + begin;
    sum_strided<S>(partials, 2 * merged, blocks, S(1), count,
                   static_cast<S*>(args.grad_norm_weight) + begin);
    sum_strided<S>(partials + merged, 2 * merged, blocks, S(1), count,
                   static_cast<S*>(args.grad_norm_bias) + begin);
  });
}

}  // namespace UHD_ISA
}  // namespace uhd
