// The plain-data face between the operators (torch types) and the loops that run them (none): what to read, where to
// write, over which space. Shared by the baseline, SIMD and CUDA units, so it holds data and, but for a constant's
// conversion, no inline arithmetic.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VF_HD __host__ __device__ __forceinline__
#define VF_CALLED VF_HD
#define VF_ROLLED _Pragma("unroll 1")  // before a loop that is to stay one
#else
#define VF_HD inline __attribute__((always_inline))
#define VF_CALLED __attribute__((noinline))  // a CPU calls it, however often it is used
#define VF_ROLLED _Pragma("GCC unroll 1")
#endif

// Code compiled once per instruction set lives in an inline namespace of that name: an inline function shared between
// units would let the linker pick the AVX-512 copy for a machine without it.
#if defined(CPU_CAPABILITY)
#define VF_ISA CPU_CAPABILITY
#else
#define VF_ISA scalar
#endif

// The SIMD unit for x86 without AVX2, for which at::vec has nothing but arrays that take minutes to compile.
#if defined(CPU_CAPABILITY_DEFAULT) && defined(__x86_64__)
#define VF_ONE_LANE
#endif

namespace vaefast {

constexpr int kMaxDims = 8;
constexpr int kMaxParams = 4;
constexpr int kMaxOptions = 6;

enum class DType : int32_t { kFloat, kDouble, kHalf, kBFloat16, kBool };

enum class Reduction : int32_t { kNone, kPerSample, kBatchMean, kSum, kMean, kPerDraw };

// A constant of the loops, in either arithmetic: a GPU converts from double slowly.
struct Number {
  double wide = 0;
  float narrow = 0;

  Number() = default;
  VF_HD Number(double x) : wide(x), narrow(float(x)) {}
};

// What a likelihood is told besides its parameters.
using Options = Number[kMaxOptions];

// How the CUDA loops reach an operand; set at launch.
enum class Access : int32_t {
  kConstant,   // no memory: `value`
  kScalar,     // one element for all
  kLinear,     // element i of the space is element i of memory
  kRowScalar,  // one element for each stretch along the last dimension
  kView,       // by its index in every dimension
};

// How the CUDA loops move a launch's operands; set at launch.
enum class Moves : int32_t {
  kSingle,  // element by element
  kPacked,  // a pack at a time, each operand in its own way
  // whole packs; each operand linear, or so along the last of two dimensions, a scalar for all or for each row (of the
  // arithmetic type), or constant. The linear ones are of
  kPlain,  // the arithmetic type
  kPlainHalf,
  kPlainBFloat16,
};

// A tensor seen through the iteration space, or the constant `value` where data is null.
struct Operand {
  void* data = nullptr;
  Number value;
  int64_t stride[kMaxDims] = {};  // in elements
  DType dtype = DType::kFloat;
  Access access = Access::kConstant;
  bool linear = false;  // element i of the space is element i of memory
  uint8_t number = 0;   // which of a listed posterior's operands it is; see cuda/list.cuh
  uint32_t skip = 0;    // plain moves: bytes from where linear memory would go on to the next row
};

// Row-major iteration space. The batch is outermost where rows > 1 sums are wanted.
struct Space {
  int32_t ndim = 1;
  int64_t size[kMaxDims] = {};
  int64_t numel = 0;
  int64_t rows = 1;  // sums asked for
  // For the CUDA loops, set at launch:
  bool views = false;  // an operand's place follows from the index in every dimension
  Moves moves = Moves::kSingle;
  // x / (last dimension) is x * reciprocal >> (32 + shift), for x < 2^31
  uint32_t reciprocal = 0, shift = 0;
};

// Where the noise comes from: a tensor of two words, or a generator's state as it stood at launch or, under CUDA-graph
// capture, as it will stand at replay. counter = ((offset ? *offset : offset_value) + offset_add) >> offset_shift.
struct Philox {
  const int64_t* seed = nullptr;
  const int64_t* offset = nullptr;
  uint64_t seed_value = 0;
  uint64_t offset_value = 0;
  uint64_t offset_add = 0;
  int32_t offset_shift = 0;
  int64_t* save = nullptr;        // [2]: seed and counter, for backward
  int64_t stride[kMaxDims] = {};  // the sample's memory order, which numbers the elements
  bool linear = false;
  bool on = false;
};

// std = activation(clamp(raw, lo, hi)) + floor; no gradient passes outside the clamp or on its edges.
struct Activation {
  int32_t kind = 0;  // index into Parameterizations
  Number lo, hi, floor;
  bool clamped = false, floored = false;
};

// out[row] = scale * sum of the row's elements, in the arithmetic type; nothing where out is null.
struct Sum {
  double* partial = nullptr;  // [units], the runner's scratch
  double scale = 1.0;
  void* out = nullptr;  // [rows]
};

// Forward: z and kl from (mu, raw, prior, noise). Backward: the d* outputs from the same and from dz, dkl * dkl_scale
// and, for the prior's, dkl * dkl_prior_scale.
struct PosteriorProblem {
  Space space;
  Activation activation;
  bool wide = false;  // arithmetic in double
  bool sample = false, kl = false, prior = false, backward = false;
  Operand mu, raw, prior_mu, prior_logvar, eps, dz, dkl;
  Operand out_z, out_kl;
  Operand out_dmu, out_draw, out_dprior_mu, out_dprior_logvar;
  Number dkl_scale = 1.0, dkl_prior_scale = 1.0;
  Philox philox;
  Sum sum;
};

// nll and/or its gradients; a gradient is d nll / d param * weight * upstream * grad_scale. Or, where `kept`, nothing
// but the gradients in out_grad that an earlier run left there, multiplied by upstream, unless that is one number
// and 1.
struct ReconstructionProblem {
  Space space;
  int32_t likelihood = 0;  // index into Likelihoods
  Options options;
  int32_t nparams = 1;
  bool wide = false;
  bool nll = false, grad = false, kept = false;
  Operand param[kMaxParams], target;
  Operand weight{nullptr, 1.0}, upstream{nullptr, 1.0};
  Operand out_nll, out_grad[kMaxParams];
  Number grad_scale = 1.0;
  Sum sum;
  // A mixture's space is its sites. The parameter and its gradient have `planes` of them, the target one for each of
  // its channels (or just one), so many elements of memory apart.
  int32_t planes = 1, channels = 0;
  int64_t param_step = 0, target_step = 0, grad_step = 0;
  int32_t chunk = 1;  // for the CUDA loops, set at launch: logits, of one site or of several, that move together
};

// The marginals of a batch's aggregate posterior: for each latent d and sample i
//     marginals[d][i] = log sum_j W_ij e^(constant[d][j] - t^2),   t = (z[d][i] - mu[d][j]) slope[d][j],
// W being 1 but in two columns of each row. Backward: from those and g the gradients of sum_di g[i] marginals[d][i] in
// z, mu and in the log variance, of which slope is e^(-logvar / 2) / sqrt(2), and constant -logvar / 2.
// Everything is contiguous, of the arithmetic type.
struct MarginalsProblem {
  int64_t latents = 0, batch = 0;
  bool wide = false, backward = false;
  const void *z = nullptr, *mu = nullptr, *slope = nullptr, *constant = nullptr;  // [latents, batch]
  // [batch]: the columns, whole numbers in the arithmetic type, and log W there; null where there are none
  const void* column[2] = {};
  const void* log[2] = {};
  void* marginals = nullptr;  // written forward, read backward
  const void* g = nullptr;    // [batch]
  void* dz = nullptr;
  // [chunks, latents, batch]: chunks of the samples, whose sums are yet to be added up
  int64_t chunks = 1;
  void *dmu = nullptr, *dlogvar = nullptr;
};

// Categorical latents: q = share * softmax(logits) + (1 - share) / classes of each site and a p likewise, KL(q || p) in
// out_kl and, where there are uniform numbers, a one-hot sample of q. Backward: the d* outputs from the same, from the
// sample's gradient dz and, as far as it is a KL's, from dkl * dkl_scale or dkl * dkl_prior_scale. The space is the
// sites; an operand with all of a site's classes has its place at the first, and they are `*_step` elements apart.
struct CategoricalProblem {
  Space space;
  int64_t classes = 1;
  bool wide = false;  // arithmetic in double
  bool kl = false, backward = false;
  Number share = 1.0, uniform = 0.0;  // and (1 - share) / classes / share
  Operand logits, prior, dz, dkl, uniforms;
  Operand out_z, out_kl, out_dlogits, out_dprior;
  int64_t logits_step = 0, prior_step = 0, dz_step = 0, out_z_step = 0, out_dlogits_step = 0, out_dprior_step = 0;
  Number dkl_scale = 1.0, dkl_prior_scale = 1.0;
  // out_kl's memory, contiguous, whose rows are added up
  const void* each = nullptr;
  Sum sum;
};

// A Gaussian's numbers, [samples, latents]; root is 1 / std.
struct GaussianNumbers {
  const void *mu = nullptr, *logvar = nullptr, *root = nullptr;
};

// Under what draws have a density besides their posterior's: nothing, N(0, I) or a Gaussian of numbers.
enum class DrawPrior : int32_t { kNone, kStandard, kGiven };

// The log density ratio of each draw of each sample, summed over the latents:
//     ratio[k][b] = sum_d log p(z[k][b][d]) - log q(z[k][b][d]),
// p being the prior, or 1 where there is none, and log(2 pi) left out of both. Backward: from g[k][b] the gradients in
// z, q's mu and logvar and, where they are not null, p's. Everything is contiguous, of the arithmetic type.
struct LogRatioProblem {
  int64_t draws = 0, samples = 0, latents = 0;
  bool wide = false, backward = false;
  DrawPrior prior = DrawPrior::kNone;
  const void* z = nullptr;
  GaussianNumbers q, p;
  void* ratio = nullptr;
  const void* g = nullptr;
  void *dz = nullptr, *dmu = nullptr, *dlogvar = nullptr, *dprior_mu = nullptr, *dprior_logvar = nullptr;
};

// The product of Gaussian experts, [experts, columns], and with `prior` N(0, I): from mus and logvars
//     1 / var = prior + sum_m 1 / var_m,   mu = var sum_m mu_m / var_m
// in mu and logvar, [columns]. Backward: from dmu and dlogvar, null for 0, the experts' gradients in dmus and dlogvars,
// of which one may be null. Everything is contiguous, of the arithmetic type.
struct ExpertsProblem {
  int64_t experts = 0, columns = 0;
  bool wide = false, backward = false, prior = false;
  const void *mus = nullptr, *logvars = nullptr;
  // [experts, rows]: which experts there are in columns / rows columns each, or null for all
  const bool* there = nullptr;
  int64_t rows = 0;
  void *mu = nullptr, *logvar = nullptr;
  const void *dmu = nullptr, *dlogvar = nullptr;
  void *dmus = nullptr, *dlogvars = nullptr;
};

// The log density of a mixture of diagonal Gaussians at each sample:
//     value[b] = log sum_k e^x[b][k],   x[b][k] = log weight[k] - sum_d (t^2 + logvars[k][d] + log(2 pi)) / 2,
//     t = (z[b][d] - mus[k][d]) e^(-logvars[k][d] / 2),
// the weights being softmax(logits), or alike where those are null. Backward: from g[b] the sums for the gradients in
// mus, logvars and the log weights, and dz itself. Tensors are contiguous, float or double; the arithmetic is double.
struct MixtureProblem {
  int64_t samples = 0, components = 0, latents = 0;
  bool wide = false, backward = false;
  const void *z = nullptr, *mus = nullptr, *logvars = nullptr, *logits = nullptr;
  const void* g = nullptr;
  void *value = nullptr, *dz = nullptr, *dmus = nullptr, *dlogvars = nullptr, *dlogits = nullptr;

  // numbers that backward adds up: for dmus, for dlogvars, and for the log weights, of a component each
  int64_t sums() const { return (2 * latents + 1) * components; }
};

// What IVON's formulas take besides tensors.
struct IvonNumbers {
  double ess = 1, weight_decay = 0, beta1 = 0, beta2 = 0;
  double unbias = 1;  // the momentum's factor, 1 / (1 - beta1^steps)
  double rate = 0, clip_radius = 0;
};

// A draw: param's values go to mean, a draw from their posterior to param, and what lies between to noise. Or a step of
// param, momentum and hess. All are numel numbers of the arithmetic type, one after the other.
struct IvonProblem {
  int64_t numel = 0;
  bool wide = false, draw = false;
  IvonNumbers numbers;
  void *param = nullptr, *momentum = nullptr, *hess = nullptr;
  void *mean = nullptr, *noise = nullptr;
  const void *gradient = nullptr, *product = nullptr;
  Philox philox;
};

// The negative importance-weighted bound of each sample, of weights w[k][b] = e^ratio[k][b] / p(x|z), and what is left
// of it when `scale` multiplies the sum over samples or, without `sum`, each:
//     loss = scale * (log draws - log sum_k w[k]),   share[k][b] = scale * w[k][b] / sum_k w[k][b]
// The reconstruction's rows are the draws' samples. Its gradients, if it has any, are left multiplied by the shares:
// `rescale` is the problem that does it.
struct BoundProblem {
  int64_t draws = 0, samples = 0;
  bool wide = false, sum = false;
  double scale = 1.0;
  const void* ratio = nullptr;  // [draws, samples], double where ratio_wide
  bool ratio_wide = false;
  void *loss = nullptr, *log_weights = nullptr, *share = nullptr;  // double where wide; share may be null
  ReconstructionProblem* reconstruction = nullptr;
  ReconstructionProblem* rescale = nullptr;
};

// What one call asks of a device: either problem or both, and with both total[row] = nll[row] + beta * kl[row]. Several
// posteriors have one sum in common, over the rows that all of them have.
struct Job {
  PosteriorProblem* posterior = nullptr;
  int64_t posteriors = 1;
  ReconstructionProblem* reconstruction = nullptr;
  void* total = nullptr;
  double beta = 1.0;
};

}  // namespace vaefast
