// SPDX-License-Identifier: Apache-2.0
// Window attention on the CUDA cores: rows of a head spread over a team of lanes.
//
// A team is 8, 16 or 32 neighbouring lanes that work for one token and one head. Its lanes lie side
// by side along the channels, kWidth elements each, kChunks times: a piece of kSpan channels.
// Longer heads are walked in pieces. Neighbouring teams have neighbouring tokens in window-major
// order, so the teams of a warp mostly read the same rows at the same time, and those of a block
// meet them in the L1 cache.
#pragma once
#include "common/windows.cuh"
#include "window_attention/window_attention.h"

namespace uhd {
namespace {

// How a head lies on a team.
template <class T_, int kWidth_, int kLanes_, int kChunks_>
struct Shape {
  using T = T_;
  using S = AccumulateT<T>;
  static constexpr int kWidth = kWidth_;
  static constexpr int kLanes = kLanes_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kSpan = kWidth * kLanes * kChunks;
};

struct Traits {
  // Small enough that registers, not the size of a block, decide how many warps an SM holds; large
  // enough that a block holds the 16 tokens of a 4 x 4 window with teams of 8.
  static constexpr int kThreads = 128;
  // Leaves the compiler all 255 registers. Where it may choose, it spills a few of them to fit
  // another block on an SM.
  static constexpr int kBlocks = 2;
  // Keys whose rows are on their way at the same time. A 2 x 2 window is one such tile.
  static constexpr int kKeys = 4;
};

// Calls function(shape) for a head size. Chunks beyond the head cost instructions but no memory
// traffic, so the spans follow the head sizes of vision transformers: 64, 72, 80, 96, 128. With
// 16-byte accesses 8 lanes read 128 bytes, a cache line; fewer lanes need fewer shuffles.
template <class T, int kWidth, class Function>
const char* with_shape(int64_t head_dim, Function&& function) {
  if constexpr (kWidth == 1) {
    return function(Shape<T, 1, 32, 4>{});
  } else if constexpr (sizeof(T) == 2) {
    return head_dim <= 128 ? function(Shape<T, 8, 8, 2>{}) : function(Shape<T, 8, 32, 1>{});
  } else if constexpr (sizeof(T) == 4) {
    if (head_dim <= 64) return function(Shape<T, 4, 8, 2>{});
    return head_dim <= 96 ? function(Shape<T, 4, 8, 3>{}) : function(Shape<T, 4, 32, 2>{});
  } else {
    return head_dim <= 96 ? function(Shape<T, 2, 16, 3>{}) : function(Shape<T, 2, 32, 4>{});
  }
}

// The sum over the lanes of a team, the same bits in each. All lanes of the team must call it;
// other teams of the warp may be elsewhere.
template <class Shape>
UHD_DEVICE typename Shape::S team_sum(typename Shape::S value) {
  const unsigned first = threadIdx.x % kWarp / Shape::kLanes * Shape::kLanes;
  const unsigned mask = kFullWarp >> (kWarp - Shape::kLanes) << first;
#pragma unroll
  for (int distance = Shape::kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(mask, value, distance);
  }
  return value;
}

// What a lane holds of up to kSpan channels.
template <class Shape>
struct Piece {
  using T = typename Shape::T;
  using S = typename Shape::S;
  using Chunk = Elements<T, Shape::kWidth>;
  Chunk chunk[Shape::kChunks];

  // The first channel of a chunk of this lane.
  UHD_DEVICE static int channel(int c) {
    return (c * Shape::kLanes + int(threadIdx.x) % Shape::kLanes) * Shape::kWidth;
  }
  UHD_DEVICE static Piece zero() {
    Piece piece;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) piece.chunk[c] = Chunk::zero();
    return piece;
  }
  // The next channels of a row, of which `left` are left; zeros after the last one.
  UHD_DEVICE static Piece load(const T* from, int64_t left) {
    const int count = left < Shape::kSpan ? int(left) : Shape::kSpan;
    Piece piece;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      piece.chunk[c] = channel(c) < count ? Chunk::load(from + channel(c)) : Chunk::zero();
    }
    return piece;
  }
  UHD_DEVICE void store(T* to, int64_t left) const {
    const int count = left < Shape::kSpan ? int(left) : Shape::kSpan;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      if (channel(c) < count) chunk[c].store(to + channel(c));
    }
  }
  // This lane's share of the dot product.
  UHD_DEVICE S dot(const Piece& other) const {
    S sum = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum += at(i) * other.at(i);
    return sum;
  }
  UHD_DEVICE void add(S factor, const Piece& other) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) at(i) += factor * other.at(i);
  }
  UHD_DEVICE void scale(S factor) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) at(i) *= factor;
  }

 private:
  static constexpr int kElements = Shape::kChunks * Shape::kWidth;
  UHD_DEVICE S& at(int i) { return chunk[i / Shape::kWidth].value[i % Shape::kWidth]; }
  UHD_DEVICE const S& at(int i) const { return chunk[i / Shape::kWidth].value[i % Shape::kWidth]; }
};

// One head of a tensor.
template <class Shape>
struct Head {
  using T = typename Shape::T;
  using Part = Piece<Shape>;
  const T* first;  // its row of token 0
  int64_t token_stride, head_dim;

  UHD_DEVICE Head(const WindowAttention& args, const void* data, TokenStrides strides, int64_t head)
      : first(static_cast<const T*>(data) + head * strides.head),
        token_stride(strides.token),
        head_dim(args.head_dim) {}
  UHD_DEVICE const T* row(int token) const { return first + token * token_stride; }
  // The channels from `begin` on.
  UHD_DEVICE Part piece(int token, int64_t begin) const {
    return Part::load(row(token) + begin, head_dim - begin);
  }
};

// A row whose first piece stays in registers, for dot products with many others.
template <class Shape>
struct HeldRow {
  using S = typename Shape::S;
  const Head<Shape>& head;
  int token;
  Piece<Shape> first;

  UHD_DEVICE HeldRow(const Head<Shape>& head_, int token_)
      : head(head_), token(token_), first(head_.piece(token_, 0)) {}
  // The product with a row of another head, whose first piece is given; the same in every lane.
  UHD_DEVICE S dot(const Head<Shape>& other, int other_token,
                   const Piece<Shape>& other_first) const {
    S sum = first.dot(other_first);
#pragma unroll 1  // seldom run
    for (int64_t begin = Shape::kSpan; begin < head.head_dim; begin += Shape::kSpan) {
      sum += head.piece(token, begin).dot(other.piece(other_token, begin));
    }
    return team_sum<Shape>(sum);
  }
};

// Where the work of a team is: one token, and the window that it belongs to.
struct Place {
  DeviceWindow window;
  int token;     // packed index
  int position;  // the token's place when tokens are in window-major order
};

// The token at a position of window-major order, which must be below num_tokens().
UHD_DEVICE Place place_at(const ViewTable& table, int position) {
  const ViewRow view = table.rows[view_of_token(table, position)];
  const int begin = int(view.token_begin), height = int(view.height), width = int(view.width);
  // Sides of a window that is not at an edge; a larger window is the whole view.
  const int full_rows = int(table.window < height ? table.window : height);
  const int full_cols = int(table.window < width ? table.window : width);
  int rest = position - begin;
  const int top = rest / (full_rows * width) * full_rows;
  const int rows = height - top < full_rows ? height - top : full_rows;
  rest -= top * width;
  const int left = rest / (rows * full_cols) * full_cols;
  const int cols = width - left < full_cols ? width - left : full_cols;
  rest -= left * rows;
  const int first = begin + top * width + left;
  return {{first, width, rows, cols, position - rest},
          first + rest / cols * width + rest % cols,
          position};
}

// Walks over the tokens of a window in raster order.
class Walk {
 public:
  UHD_DEVICE explicit Walk(const DeviceWindow& window)
      : token_(window.first),
        position_(window.compact),
        left_(window.size()),
        cols_(window.cols),
        col_(0),
        to_next_row_(window.row_stride - window.cols) {}
  UHD_DEVICE bool more() const { return left_ > 0; }
  UHD_DEVICE int left() const { return left_; }
  UHD_DEVICE int token() const { return token_; }        // packed index
  UHD_DEVICE int position() const { return position_; }  // in window-major order
  UHD_DEVICE void advance() {
    if (--left_ <= 0) return;  // the next token may not exist, nor its number
    ++token_;
    ++position_;
    if (++col_ == cols_) {
      col_ = 0;
      token_ += to_next_row_;
    }
  }

 private:
  int token_, position_, left_, cols_, col_, to_next_row_;
};

// Calls body(place, head) for the token and head of this team, or padding(row, head) where the row
// lies beyond the views. Block after block takes the same tokens of the next of `num_heads` heads,
// so neighbours read neighbouring memory.
template <class Shape, class Body, class Padding>
UHD_DEVICE void for_team(const WindowAttention& args, int64_t num_heads, int64_t first_block,
                         Body&& body, Padding&& padding) {
  const uint64_t block = uint64_t(first_block) + blockIdx.x, heads = uint64_t(num_heads);
  const int64_t head = int64_t(block % heads);
  const int64_t row =
      int64_t(block / heads) * (Traits::kThreads / Shape::kLanes) + threadIdx.x / Shape::kLanes;
  if (row < args.views.num_tokens()) {
    body(place_at(args.views, int(row)), head);
  } else if (row < args.views.token_rows) {
    padding(row, head);
  }
}

// The row of a token and head in a tensor whose heads lie side by side.
template <class Shape>
UHD_DEVICE typename Shape::T* result_row(const WindowAttention& args, void* data, int64_t stride,
                                         int64_t row, int64_t head) {
  return static_cast<typename Shape::T*>(data) + row * stride + head * args.head_dim;
}

// Writes zeros to it.
template <class Shape>
UHD_DEVICE void zero_row(const WindowAttention& args, void* data, int64_t stride, int64_t row,
                         int64_t head) {
  typename Shape::T* out = result_row<Shape>(args, data, stride, row, head);
  for (int64_t begin = 0; begin < args.head_dim; begin += Shape::kSpan) {
    Piece<Shape>::zero().store(out + begin, args.head_dim - begin);
  }
}

// Launches kernel(args, first_block), one team for every token and each of so many heads: once,
// unless there are more blocks than a grid can hold.
template <class Shape>
const char* launch_teams(void (*kernel)(WindowAttention, int64_t), const WindowAttention& args,
                         int64_t heads, void* stream) {
  constexpr int64_t kTeams = Traits::kThreads / Shape::kLanes, kMost = INT32_MAX;
  if (args.head_dim == 0) return nullptr;
  const int64_t blocks = ceil_div(args.views.token_rows, kTeams) * heads;
  for (int64_t first = 0; first < blocks; first += kMost) {
    const dim3 grid(unsigned(blocks - first < kMost ? blocks - first : kMost));
    const char* error = launch(kernel, grid, dim3(Traits::kThreads), 0, stream, args, first);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace uhd
