// SPDX-License-Identifier: Apache-2.0
// Forward: a thread copies 16 bytes into one tile. Backward: it sums 16 bytes over the tiles, in
// their order.
#include "common/tiles.cuh"
#include "common/words.cuh"
#include "tile_vector/tile_vector.h"

namespace uhd {
namespace {

// args.size is in words.
template <class Word>
__global__ void __launch_bounds__(TileTraits::kThreads) vector_forward(const TileVector args) {
  for_matrix(args.tiles, args.size, [&](int64_t tile, int64_t i) {
    static_cast<Word*>(args.out)[tile * args.size + i] = static_cast<const Word*>(args.vector)[i];
  });
}

template <class T, int kWidth>
__global__ void __launch_bounds__(TileTraits::kThreads) vector_backward(const TileVector args) {
  for_matrix(1, args.size / kWidth, [&](int64_t, int64_t chunk) {
    const int64_t i = chunk * kWidth;
    sum_tiles<T, kWidth>(static_cast<const T*>(args.grad_out) + i, args.size, args.tiles,
                         AccumulateT<T>(1), static_cast<T*>(args.grad_vector) + i);
  });
}

}  // namespace

namespace cuda {

const char* tile_vector_forward(const TileVector& args, void* stream) {
  const auto run = [&](auto word, int64_t elements) {
    TileVector in_words = args;
    in_words.size /= elements;
    return launch(vector_forward<decltype(word)>, matrix_grid(args.tiles, in_words.size),
                  TileTraits::kThreads, 0, stream, in_words);
  };
  return with_word(args.dtype, args.size, {{args.vector, args.size}}, run);
}

const char* tile_vector_backward(const TileVector& args, void* stream) {
  const auto run = [&](auto x, auto width) {
    return launch(vector_backward<decltype(x), width>, matrix_grid(1, args.size / width),
                  TileTraits::kThreads, 0, stream, args);
  };
  return with_width(args.dtype, args.size, {{args.grad_out, args.size}}, run);
}

}  // namespace cuda
}  // namespace uhd
