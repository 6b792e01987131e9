// SPDX-License-Identifier: Apache-2.0
// One window and head at a time. A full 2 x 2 window is one tile and stays in registers. Other
// windows, larger or ragged, go four query rows at a time through rows of scores in `scratch`; a
// tile that hangs over the end of the window repeats the last token, and those scores are not used.
#include "window_attention/rotary.h"
#include "window_attention/rows.h"
#include "window_attention/tile.h"
#include "window_attention/window_attention.h"

namespace uhd {

namespace {

// Heads go through the stages of a 2 x 2 window in groups: a softmax is a long chain of dependent
// instructions, and those of several heads overlap. The rows of a group stay in L1.
constexpr int kHeadGroup = 4;

}  // namespace

#ifdef UHD_ISA_SCALAR
int64_t window_attention_scratch(const WindowAttention& args, int64_t tokens) {
  const int64_t padded = (tokens + 15) / 16 * 16;  // whole vectors of scores
  const int64_t own = 2 * kTile * padded + 2 * tokens * args.head_dim;
  if (args.cos == nullptr) return own;
  const int64_t large = rotary_scratch(args, tokens, 1);
  const int64_t small = rotary_scratch(args, kTile, kHeadGroup);
  return own + (large > small ? large : small);
}
#endif

namespace UHD_ISA {
namespace {

// ---- forward

template <class T, int kDim, class Q>
void forward_2x2(const WindowAttention& args, const Place& at) {
  using S = AccumulateT<T>;
  Quad<const Q> q(static_cast<const Q*>(args.q), args.q_strides, at.qk);
  Quad<const Q> k(static_cast<const Q*>(args.k), args.k_strides, at.qk, args.group);
  Quad<const T> v(static_cast<const T*>(args.v), args.v_strides, at.v, args.group);
  Quad<T> out(static_cast<T*>(args.out), {args.out_stride, args.head_dim}, at.out);
  for (int64_t left = args.heads; left > 0; left -= kHeadGroup) {
    const int heads = static_cast<int>(left < kHeadGroup ? left : kHeadGroup);
    Tile<S> p[kHeadGroup];
    for (int i = 0; i < heads; ++i, q.next_head(), k.next_head()) {
      dot_tile<Q, kDim>(q.rows(), k.rows(), args.head_dim, static_cast<S>(args.scale), p[i]);
    }
    for (int i = 0; i < heads; ++i) softmax_tile(p[i]);
    for (int i = 0; i < heads; ++i, v.next_head(), out.next_head()) {
      const auto weight = [&](int row, int column) { return p[i].at[row][column]; };
      mix_tile<T, kDim>(v.rows(), weight, args.head_dim, out.rows());
    }
  }
}

// Four rows of scores for all keys of the window; `padded` elements apart.
template <class T, class S>
void score_rows(const T* const* q, const Rows<const T>& k, int64_t tokens, int64_t dim, S scale,
                int64_t padded, S* scores) {
  for (int64_t j = 0; j < tokens; j += kTile) {
    const T* keys[kTile];
    k.tile(j, keys);
    Tile<S> tile;
    dot_tile<T, 0>(q, keys, dim, scale, tile);
    for (int i = 0; i < kTile; ++i) {
      for (int c = 0; c < kTile; ++c) scores[i * padded + j + c] = tile.at[i][c];
    }
  }
}

template <class S>
void softmax_row(S* row, int64_t tokens, int64_t padded) {
  S largest = row[0];
  for (int64_t j = 1; j < tokens; ++j) largest = row[j] > largest ? row[j] : largest;
  for (int64_t j = tokens; j < padded; ++j)
    row[j] = largest;  // finite where the row is; not summed
  S sum = 0;
  for (int64_t j = 0; j < padded; j += kLanes<S>) store(row + j, exp(load(row + j) - largest));
  for (int64_t j = 0; j < tokens; ++j) sum += row[j];
  const S inverse = S(1) / sum;
  for (int64_t j = 0; j < tokens; ++j) row[j] *= inverse;
}

template <class T, class Q>
void forward_any(const WindowAttention& args, const Place& at, AccumulateT<T>* scores) {
  using S = AccumulateT<T>;
  const int64_t tokens = at.qk.size(), padded = (tokens + 15) / 16 * 16, dim = args.head_dim;
  for (int64_t head = 0; head < args.heads; ++head) {
    const Head<T, Q> in(args, at, head);
    const Rows<T> out(static_cast<T*>(args.out), {args.out_stride, dim}, at.out, head);
    for (int64_t i = 0; i < tokens; i += kTile) {
      const Q* q[kTile];
      in.q.tile(i, q);
      score_rows<Q, S>(q, in.k, tokens, dim, static_cast<S>(args.scale), padded, scores);
      const int64_t rows = tokens - i < kTile ? tokens - i : kTile;
      for (int64_t r = 0; r < rows; ++r) softmax_row(scores + r * padded, tokens, padded);
      for_channels<T>(dim, [&](int64_t c, auto load, auto store) {
        Vec<S> acc[kTile] = {};
        for (int64_t j = 0; j < tokens; ++j) {
          const Vec<S> value = load(in.v[j] + c);
          for (int64_t r = 0; r < rows; ++r) acc[r] = value * scores[r * padded + j] + acc[r];
        }
        for (int64_t r = 0; r < rows; ++r) store(out[i + r] + c, acc[r]);
      });
    }
  }
}

// ---- backward
// Nothing is saved by the forward pass but q, k, v: the probabilities of a window are recomputed
// here.

// acc_j += sum over up to four rows r of weights[r][j] * rows_r, for every token j of the window.
template <class T, class S>
void accumulate(const T* const* rows, int64_t num_rows, const S* weights, int64_t padded,
                int64_t tokens, int64_t dim, S* acc) {
  for_channels<T>(dim, [&](int64_t c, auto load, auto store) {
    Vec<S> value[kTile] = {};
    for (int64_t r = 0; r < num_rows; ++r) value[r] = load(rows[r] + c);
    for (int64_t j = 0; j < tokens; ++j) {
      Vec<S> sum = load(acc + j * dim + c);
      for (int64_t r = 0; r < num_rows; ++r) sum = value[r] * weights[r * padded + j] + sum;
      store(acc + j * dim + c, sum);
    }
  });
}

// The gradients of a window's keys and values, summed up over the queries of all heads of a group.
template <class T, class Q, class S = AccumulateT<T>>
class KeySums {
 public:
  KeySums(S* scratch, int64_t tokens, int64_t dim)
      : tokens_(tokens), dim_(dim), sum_k_(scratch), sum_v_(scratch + tokens * dim) {}

  void clear() {
    for (int64_t i = 0; i < 2 * tokens_ * dim_; ++i) sum_k_[i] = 0;  // sum_v follows
  }
  // Up to four queries, and their rows of the gradients of the scores and of the probabilities.
  void add(const Q* const* q, const T* const* grad_out, int64_t num_rows, const S* ds, const S* p,
           int64_t padded) {
    accumulate(q, num_rows, ds, padded, tokens_, dim_, sum_k_);
    accumulate(grad_out, num_rows, p, padded, tokens_, dim_, sum_v_);
  }
  // grad_k[j] and grad_v[j] are rows.
  template <class KeyRows, class ValueRows>
  void store_to(const KeyRows& grad_k, const ValueRows& grad_v) const {
    for (int64_t j = 0; j < tokens_; ++j) {
      for_channels<T>(dim_, [&](int64_t c, auto load, auto store) {
        store(grad_k[j] + c, load(sum_k_ + j * dim_ + c));
        store(grad_v[j] + c, load(sum_v_ + j * dim_ + c));
      });
    }
  }

 private:
  int64_t tokens_, dim_;
  S *sum_k_, *sum_v_;
};

template <class T, int kDim, class Q>
void backward_2x2(const WindowAttention& args, const Place& at, AccumulateT<T>* scratch) {
  using S = AccumulateT<T>;
  const int64_t dim = args.head_dim, group = args.group;
  const S scale = static_cast<S>(args.scale);
  Quad<const Q> q(static_cast<const Q*>(args.q), args.q_strides, at.qk);
  Quad<const Q> k(static_cast<const Q*>(args.k), args.k_strides, at.qk, group);
  Quad<const T> v(static_cast<const T*>(args.v), args.v_strides, at.v, group);
  Quad<const T> grad_out(static_cast<const T*>(args.grad_out), args.grad_out_strides, at.out);
  Quad<Q> grad_q(static_cast<Q*>(args.grad_q), {args.grad_q_stride, dim}, at.qk);
  Quad<Q> grad_k(static_cast<Q*>(args.grad_k), {at.grad_k_stride, dim}, at.qk, group);
  Quad<T> grad_v(static_cast<T*>(args.grad_v), {args.grad_kv_stride, dim}, at.v, group);
  KeySums<T, Q> sums(scratch, kTile, dim);
  int64_t left_in_group = 0;  // counted where there are groups
  for (int64_t left = args.heads; left > 0; left -= kHeadGroup) {
    const int heads = static_cast<int>(left < kHeadGroup ? left : kHeadGroup);
    Tile<S> p[kHeadGroup], ds[kHeadGroup];
    Quad<const Q> q_again = q, k_again = k;
    Quad<const T> grad_out_again = grad_out;
    for (int i = 0; i < heads; ++i) {
      dot_tile<Q, kDim>(q.rows(), k.rows(), dim, scale, p[i]);
      dot_tile<T, kDim>(grad_out.rows(), v.rows(), dim, S(1), ds[i]);
      q.next_head(), k.next_head(), v.next_head(), grad_out.next_head();
    }
    for (int i = 0; i < heads; ++i) {
      softmax_tile(p[i]);
      softmax_tile_backward(p[i], scale, ds[i]);
    }
    for (int i = 0; i < heads; ++i) {
      const auto ds_row = [&](int row, int column) { return ds[i].at[row][column]; };
      const auto ds_column = [&](int row, int column) { return ds[i].at[column][row]; };
      const auto p_column = [&](int row, int column) { return p[i].at[column][row]; };
      mix_tile<Q, kDim>(k_again.rows(), ds_row, dim, grad_q.rows());
      if (group == 1) {
        mix_tile<Q, kDim>(q_again.rows(), ds_column, dim, grad_k.rows());
        mix_tile<T, kDim>(grad_out_again.rows(), p_column, dim, grad_v.rows());
      } else {
        if (left_in_group == 0) sums.clear(), left_in_group = group;
        sums.add(q_again.rows(), grad_out_again.rows(), kTile, ds[i].at[0], p[i].at[0], kTile);
        if (--left_in_group == 0) sums.store_to(grad_k.rows(), grad_v.rows());
      }
      q_again.next_head(), k_again.next_head(), grad_out_again.next_head();
      grad_q.next_head(), grad_k.next_head(), grad_v.next_head();
    }
  }
}

template <class T, class Q>
void backward_any(const WindowAttention& args, const Place& at, AccumulateT<T>* scratch) {
  using S = AccumulateT<T>;
  const int64_t tokens = at.qk.size(), padded = (tokens + 15) / 16 * 16, dim = args.head_dim;
  const S scale = static_cast<S>(args.scale);
  S *p = scratch, *ds = p + kTile * padded;
  KeySums<T, Q> sums(ds + kTile * padded, tokens, dim);
  for (int64_t head = 0; head < args.heads; ++head) {
    const Head<T, Q> in(args, at, head);
    const Rows<const T> grad_out(static_cast<const T*>(args.grad_out), args.grad_out_strides,
                                 at.out, head);
    const Rows<Q> grad_q(static_cast<Q*>(args.grad_q), {args.grad_q_stride, dim}, at.qk, head);
    if (head % args.group == 0) sums.clear();
    for (int64_t i = 0; i < tokens; i += kTile) {
      const Q* q[kTile];
      const T* grad[kTile];
      in.q.tile(i, q);
      grad_out.tile(i, grad);
      const int64_t rows = tokens - i < kTile ? tokens - i : kTile;
      score_rows<Q, S>(q, in.k, tokens, dim, scale, padded, p);
      score_rows<T, S>(grad, in.v, tokens, dim, S(1), padded, ds);
      for (int64_t r = 0; r < rows; ++r) {
        S *p_row = p + r * padded, *ds_row = ds + r * padded, delta = 0;
        softmax_row(p_row, tokens, padded);
        for (int64_t j = 0; j < tokens; ++j) delta += p_row[j] * ds_row[j];
        for (int64_t j = 0; j < tokens; ++j) ds_row[j] = p_row[j] * (ds_row[j] - delta) * scale;
      }
      for_channels<T>(dim, [&](int64_t c, auto load, auto store) {
        Vec<S> acc[kTile] = {};
        for (int64_t j = 0; j < tokens; ++j) {
          const Vec<S> key = load(in.k[j] + c);
          for (int64_t r = 0; r < rows; ++r) acc[r] = key * ds[r * padded + j] + acc[r];
        }
        for (int64_t r = 0; r < rows; ++r) store(grad_q[i + r] + c, acc[r]);
      });
      sums.add(q, grad, rows, ds, p, padded);
    }
    if ((head + 1) % args.group != 0) continue;
    const int64_t kv_head = head / args.group;
    sums.store_to(Rows<Q>(static_cast<Q*>(args.grad_k), {at.grad_k_stride, dim}, at.qk, kv_head),
                  Rows<T>(static_cast<T*>(args.grad_v), {args.grad_kv_stride, dim}, at.v, kv_head));
  }
}

// ---- all windows of a range

template <class Full, class Any>
void for_windows(const WindowAttention& args, int64_t begin, int64_t end, Full&& full, Any&& any) {
  WindowCursor cursor(args.views, begin);
  for (int64_t i = begin; i < end; ++i) {
    const Window window = cursor.next();
    const Window out_window = args.window_order ? in_window_order(window) : window;
    window.rows == 2 && window.cols == 2 ? full(window, out_window) : any(window, out_window);
  }
}

// Calls body with the head size as a compile-time constant where that pays: SigLIP-so400m (72) and
// ViT-B/L (64).
template <class Body>
void dispatch_head_dim(int64_t dim, Body&& body) {
  if (dim == 72) return body(std::integral_constant<int, 72>{});
  if (dim == 64) return body(std::integral_constant<int, 64>{});
  body(std::integral_constant<int, 0>{});
}

}  // namespace

void window_attention_forward(const WindowAttention& args, int64_t begin, int64_t end,
                              void* scratch) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const auto own = static_cast<AccumulateT<T>*>(scratch);
    dispatch_head_dim(args.head_dim, [&](auto dim) {
      for_windows(
          args, begin, end,
          [&](const Window& w, const Window& out) {
            with_rotation<T>(args, w, out, kHeadGroup, own,
                             [&](auto qk, const auto& part, const Place& at, auto*) {
                               forward_2x2<T, dim.value, decltype(qk)>(part, at);
                             });
          },
          [&](const Window& w, const Window& out) {
            with_rotation<T>(args, w, out, 1, own,
                             [&](auto qk, const auto& part, const Place& at, auto* rest) {
                               forward_any<T, decltype(qk)>(part, at, rest);
                             });
          });
    });
  });
}

void window_attention_backward(const WindowAttention& args, int64_t begin, int64_t end,
                               void* scratch) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const auto own = static_cast<AccumulateT<T>*>(scratch);
    dispatch_head_dim(args.head_dim, [&](auto dim) {
      for_windows(
          args, begin, end,
          [&](const Window& w, const Window& out) {
            with_rotation<T>(args, w, out, kHeadGroup, own,
                             [&](auto qk, const auto& part, const Place& at, auto* rest) {
                               backward_2x2<T, dim.value, decltype(qk)>(part, at, rest);
                             });
          },
          [&](const Window& w, const Window& out) {
            with_rotation<T>(args, w, out, 1, own,
                             [&](auto qk, const auto& part, const Place& at, auto* rest) {
                               backward_any<T, decltype(qk)>(part, at, rest);
                             });
          });
    });
  });
}

}  // namespace UHD_ISA
}  // namespace uhd
