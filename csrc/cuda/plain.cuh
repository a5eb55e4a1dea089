// The plain path: whole lines of 16 bytes, all of one dtype S, of operands that are there in full, without clamp,
// floor, prior or weight. It has kernels of its own, for what a kernel might have to do takes registers also where it
// does not: alone, this path leaves twice as many threads room to wait for memory. No torch types here.
#pragma once

#include "cuda/kernel.cuh"

namespace vaefast {

// What one instruction moves.
template <class S>
struct alignas(16) Line {
  static constexpr int N = 16 / sizeof(S);
  S item[N];
};

// Lines of each operand that are under way before the first is used.
constexpr int kFlight = 2;

// Where a line begins: its element, and its row where rows lie apart.
struct At {
  uint32_t element, row;
};

template <class S>
__device__ inline Line<S>* line_at(const Operand& op, const At& at) {
  return reinterpret_cast<Line<S>*>(static_cast<char*>(op.data) + product(at.row, op.skip) +
                                    product(at.element, sizeof(S)));
}

template <class S>
__device__ inline Line<S> fetch(const Operand& op, const At& at) {
#if defined(__CUDA_ARCH__)
  // volatile: the compiler would put off the load of a second line until the first is done with
  uint32_t w[4];
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "l"(line_at<S>(op, at)));
  Line<S> line;
  memcpy(&line, w, sizeof(line));
  return line;
#else
  return *line_at<S>(op, at);
#endif
}

template <class S, class T, int N>
__device__ inline void decode(const Line<S>& line, T (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = T(load(line.item[i]));
}

template <class S, class T, int N>
__device__ inline void put(const Operand& op, const At& at, const T (&in)[N]) {
  Line<S> line;
#pragma unroll
  for (int i = 0; i < N; ++i) line.item[i] = stored<S>(in[i]);
  *line_at<S>(op, at) = line;
}

// use(at, fetch(at)) for each of the unit's lines, FLIGHT of which are under way together.
template <class S, int FLIGHT = kFlight, class Fetch, class Use>
__device__ inline void for_lines(const Space& s, const Unit& u, const Fetch& fetch, const Use& use) {
  const uint32_t step = u.width * Line<S>::N, limit = uint32_t(u.limit);
  const auto place = [&](uint32_t element) {
    return At{element, s.views ? uint32_t(product(element, s.reciprocal) >> 32) >> s.shift : 0};
  };
#pragma unroll 1
  for (uint32_t first = uint32_t(u.first) + u.lane * Line<S>::N; first < limit; first += FLIGHT * step) {
    decltype(fetch(At{})) lines[FLIGHT];
#pragma unroll
    for (int k = 0; k < FLIGHT; ++k) {
      // where there is no such line, the first again: a branch around a load would let others be put off
      const uint32_t element = first + k * step;
      lines[k] = fetch(place(element < limit ? element : first));
    }
#pragma unroll
    for (int k = 0; k < FLIGHT; ++k) {
      if (k == 0 || first + k * step < limit) use(place(first + k * step), lines[k]);
    }
  }
}

// An upstream gradient: a number for all, in memory or not.
__device__ inline float number(const Operand& op) {
  return op.data ? *static_cast<const float*>(op.data) : op.value.narrow;
}

template <class S>
struct PosteriorLines {
  Line<S> mu, raw, dz;
};

// A line's posterior, decoded. The noise comes first, while the loads are on their way.
template <class S, bool SAMPLE, int N = Line<S>::N>
struct PlainPosterior {
  float mu[N], eps[N];
  Scale<float> q[N];

  __device__ PlainPosterior(const PosteriorProblem& p, const Stream& stream, const At& at,
                            const PosteriorLines<S>& lines) {
    if constexpr (SAMPLE) {
#pragma unroll
      for (int k = 0; k < N; k += 4) normals(stream, at.element + k, reinterpret_cast<float (&)[4]>(eps[k]));
    }
    float raw[N];
    decode(lines.mu, mu);
    decode(lines.raw, raw);
    visit(p.activation.kind, Parameterizations{}, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < N; ++i) q[i] = decltype(kind)::type::eval(raw[i]);
    });
  }
};

template <class S, bool SAMPLE, bool KLD>
struct PlainForward {
  using T = float;
  static constexpr bool kSums = KLD;
  static constexpr int kBlocks = sizeof(S) == 4 ? 5 : SAMPLE && KLD ? 3 : 4;

  static __device__ T run(const PosteriorProblem& p, const Unit& u, bool first_thread) {
    Stream stream{};
    if constexpr (SAMPLE) stream = open_stream(p.philox, first_thread, 0);
    T sum = 0;
    const auto load_line = [&](const At& at) { return PosteriorLines<S>{fetch<S>(p.mu, at), fetch<S>(p.raw, at), {}}; };
    for_lines<S>(p.space, u, load_line, [&](const At& at, const PosteriorLines<S>& lines) {
      PlainPosterior<S, SAMPLE> x(p, stream, at, lines);
      T part = 0;
#pragma unroll
      for (int i = 0; i < Line<S>::N; ++i) {
        if constexpr (KLD) part += kl_of(x.mu[i], x.q[i]).value;
        if constexpr (SAMPLE) x.mu[i] = fma_(x.q[i].std, x.eps[i], x.mu[i]);
      }
      sum += part;
      if constexpr (SAMPLE) put<S>(p.out_z, at, x.mu);
    });
    return sum;
  }
};

template <class S, bool SAMPLE, bool KLD>
struct PlainBackward {
  using T = float;
  static constexpr bool kSums = false;
  static constexpr int kBlocks = sizeof(S) == 4 ? 4 : 3;

  static __device__ T run(const PosteriorProblem& p, const Unit& u, bool) {
    constexpr int N = Line<S>::N;
    Stream stream{};
    if constexpr (SAMPLE) stream = open_stream(p.philox, false, 0);
    const T g = KLD ? number(p.dkl) * p.dkl_scale.narrow : 0;
    const auto load_line = [&](const At& at) {
      PosteriorLines<S> lines{fetch<S>(p.mu, at), fetch<S>(p.raw, at), {}};
      if constexpr (SAMPLE) lines.dz = fetch<S>(p.dz, at);
      return lines;
    };
    for_lines<S>(p.space, u, load_line, [&](const At& at, const PosteriorLines<S>& lines) {
      const PlainPosterior<S, SAMPLE> x(p, stream, at, lines);
      T dmu[N] = {}, draw[N] = {};
      if constexpr (SAMPLE) decode(lines.dz, dmu);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if constexpr (SAMPLE) draw[i] = dmu[i] * x.eps[i] * x.q[i].dstd;
        if constexpr (KLD) {
          const auto k = kl_of(x.mu[i], x.q[i]);
          dmu[i] = fma_(g, k.dmu, dmu[i]);
          draw[i] = fma_(g * k.dlogvar, x.q[i].dlogvar, draw[i]);
        }
      }
      put<S>(p.out_dmu, at, dmu);
      put<S>(p.out_draw, at, draw);
    });
    return 0;
  }
};

template <class S, class L, int NP>
struct PlainReconstruction {
  using T = float;
  static constexpr bool kSums = true;
  static constexpr int kBlocks = (NP == 1 ? 5 : 4) - (sizeof(S) == 4 ? 0 : 1);

  struct Lines {
    Line<S> param[NP], target;
  };

  static __device__ T run(const ReconstructionProblem& p, const Unit& u, bool) {
    constexpr int N = Line<S>::N;
    const T factor = p.grad_scale.narrow * number(p.upstream);
    T sum = 0;
    const auto load_lines = [&](const At& at) {
      Lines lines;
      lines.target = fetch<S>(p.target, at);
#pragma unroll
      for (int k = 0; k < NP; ++k) lines.param[k] = fetch<S>(p.param[k], at);
      return lines;
    };
    // from three parameters on there is more to compute than to wait for
    for_lines<S, NP >= 3 ? 1 : kFlight>(p.space, u, load_lines, [&](const At& at, const Lines& lines) {
      T param[NP][N], target[N];
#pragma unroll
      for (int k = 0; k < NP; ++k) decode(lines.param[k], param[k]);
      decode(lines.target, target);
      T part = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        T x[NP];
#pragma unroll
        for (int k = 0; k < NP; ++k) x[k] = param[k][i];
        const auto term = eval_term<L>(x, target[i], p.options);
        part += term.nll;
#pragma unroll
        for (int k = 0; k < NP; ++k) param[k][i] = term.grad[k] * factor;
      }
      sum += part;
#pragma unroll
      for (int k = 0; k < NP; ++k) {
        if (p.out_grad[k].data) put<S>(p.out_grad[k], at, param[k]);
      }
    });
    return sum;
  }
};

// Gradients that an earlier launch left, times upstream; nothing at all where it is 1.
template <class S>
struct PlainRescale {
  using T = float;
  static constexpr bool kSums = false;
  static constexpr int kBlocks = 5;

  static __device__ T run(const ReconstructionProblem& p, const Unit& u, bool) {
    const T factor = number(p.upstream);
    if (factor == T(1)) return 0;
#pragma unroll 1
    for (int k = 0; k < p.nparams; ++k) {
      if (!p.out_grad[k].data) continue;
      const auto load_line = [&](const At& at) { return fetch<S>(p.out_grad[k], at); };
      for_lines<S, 2 * kFlight>(p.space, u, load_line, [&](const At& at, const Line<S>& line) {
        T grad[Line<S>::N];
        decode(line, grad);
#pragma unroll
        for (int i = 0; i < Line<S>::N; ++i) grad[i] *= factor;
        put<S>(p.out_grad[k], at, grad);
      });
    }
    return 0;
  }
};

// They know how to move their operands.
template <class S, bool SAMPLE, bool KLD>
constexpr bool kPlainWork<PlainForward<S, SAMPLE, KLD>> = true;
template <class S, bool SAMPLE, bool KLD>
constexpr bool kPlainWork<PlainBackward<S, SAMPLE, KLD>> = true;
template <class S, class L, int NP>
constexpr bool kPlainWork<PlainReconstruction<S, L, NP>> = true;
template <class S>
constexpr bool kPlainWork<PlainRescale<S>> = true;

}  // namespace vaefast
