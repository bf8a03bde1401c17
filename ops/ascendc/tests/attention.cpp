// Runs sparse_attention and attention_mass on the emulation against their definitions in double precision.
//   attention <check> [seed]     exits with 1 and a sentence when the check fails
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_operator.h"

#include "../attention_mass/attention_mass.h"
#include "../attention_mass/tiling.h"
#include "../sparse_attention/sparse_attention.h"
#include "../sparse_attention/tiling.h"
#include "emulation/launch.h"

using namespace npu_sparse_ascendc;
using emulation::Gm;
using emulation::GmUse;

namespace {

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

uint16_t Rounded(float value, uint32_t type)
{
    return type == FLOAT16 ? emulation::FloatToHalf(value) : emulation::FloatToBfloat16(value);
}

float Widened(uint16_t bits, uint32_t type)
{
    return type == FLOAT16 ? emulation::HalfToFloat(bits) : emulation::Bfloat16ToFloat(bits);
}

double Round(double value, uint32_t type) { return Widened(Rounded(static_cast<float>(value), type), type); }

struct Random {
    std::mt19937_64 engine;
    explicit Random(uint64_t seed) : engine(seed) {}
    uint32_t Between(uint32_t least, uint32_t most) { return least + engine() % (most - least + 1); }
    template <typename T>
    T OneOf(std::initializer_list<T> values) { return values.begin()[engine() % values.size()]; }
    std::vector<uint16_t> Normal(size_t count, uint32_t type)
    {
        std::normal_distribution<float> normal;
        std::vector<uint16_t> out(count);
        for (uint16_t& value : out) {
            value = Rounded(normal(engine), type);
        }
        return out;
    }
};

void Require(bool holds, const std::string& sentence)
{
    if (!holds) {
        throw std::runtime_error(sentence);
    }
}

// RMS error of `actual` at most twice that of another computation in the same type, or of the exact answer rounded once.
void RequireAccurate(const std::vector<double>& actual, const std::vector<double>& exact, const std::vector<double>& yardstick,
                     uint32_t type, bool roundedOutput, const std::string& problem)
{
    double error = 0, theirs = 0, rounding = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
        error += std::pow(actual[i] - exact[i], 2);
        theirs += std::pow(yardstick[i] - exact[i], 2);
        rounding += std::pow((roundedOutput ? Round(exact[i], type) : static_cast<float>(exact[i])) - exact[i], 2);
    }
    const double limit = 2 * std::sqrt(std::max(theirs, rounding) / exact.size());
    error = std::sqrt(error / exact.size());
    Require(error <= limit, problem + ": RMS error must be at most " + std::to_string(limit * 1e9) + "e-9, got " +
                                std::to_string(error * 1e9) + "e-9");
}

// sparse_attention

struct AttentionCase {
    SparseAttentionProblem p;
    std::vector<uint16_t> q, k, v;
    std::vector<int32_t> indices, count;

    std::string Text() const
    {
        char text[200];
        std::snprintf(text, sizeof text, "B %u Hq %u Hkv %u Tq %u Tk %u D %u Dv %u Hs %u K %u block %u type %u", p.batch,
                      p.queryHeads, p.keyHeads, p.queries, p.keys, p.dim, p.valueDim, p.supportHeads, p.width, p.block, p.type);
        return text;
    }
    uint32_t Blocks() const { return CeilDiv(p.queries, p.block); }
    size_t SupportRow(uint32_t b, uint32_t keyHead, uint32_t block) const
    {
        return (size_t(b) * p.supportHeads + (p.supportHeads == 1 ? 0 : keyHead)) * Blocks() + block;
    }
    size_t KeyRow(uint32_t b, uint32_t h, uint32_t s) const { return (size_t(b) * p.keyHeads + h) * p.keys + s; }
};

// Random supports, with runs of neighbours, hostile values in unused slots and NaN in keys that nobody selects.
AttentionCase MakeAttentionCase(SparseAttentionProblem p, uint64_t seed, bool empty = true)
{
    Random random(seed);
    AttentionCase c{p, random.Normal(size_t(p.batch) * p.queryHeads * p.queries * p.dim, p.type),
                    random.Normal(size_t(p.batch) * p.keyHeads * p.keys * p.dim, p.type),
                    random.Normal(size_t(p.batch) * p.keyHeads * p.keys * p.valueDim, p.type), {}, {}};
    const uint32_t rows = p.batch * p.supportHeads * c.Blocks();
    c.indices.resize(size_t(rows) * p.width);
    c.count.resize(rows);
    std::vector<char> selected(size_t(p.batch) * p.keyHeads * p.keys);
    for (uint32_t row = 0; row < rows; ++row) {
        const uint32_t block = row % c.Blocks(), head = row / c.Blocks() % p.supportHeads;
        const uint32_t b = row / c.Blocks() / p.supportHeads;
        const uint32_t visible = p.keys - p.queries + std::min((block + 1) * p.block, p.queries);
        uint32_t held = random.Between(empty ? 0 : 1, std::min(p.width, visible));
        if (empty && random.Between(0, 5) == 0) {
            held = 0;
        }
        std::vector<char> taken(visible);
        for (uint32_t chosen = 0; chosen < held;) {
            const uint32_t run = random.OneOf({1, 1, 2, 5, 40});
            for (uint32_t s = random.Between(0, visible - 1), i = 0; i < run && s < visible && chosen < held; ++i, ++s) {
                chosen += !taken[s];
                taken[s] = 1;
            }
        }
        uint32_t slot = 0;
        for (uint32_t s = 0; s < visible; ++s) {
            if (taken[s]) {
                c.indices[size_t(row) * p.width + slot++] = s;
                for (uint32_t h = 0; h < p.keyHeads; ++h) {
                    selected[c.KeyRow(b, h, s)] |= p.supportHeads == 1 || h == head;
                }
            }
        }
        c.count[row] = held;
        for (; slot < p.width; ++slot) {
            c.indices[size_t(row) * p.width + slot] = slot % 2 ? -1 : INT32_MAX;
        }
    }
    for (size_t row = 0; row < selected.size(); ++row) {
        if (!selected[row]) {
            std::fill_n(c.k.begin() + row * p.dim, p.dim, Rounded(NOT_A_NUMBER, p.type));
            std::fill_n(c.v.begin() + row * p.valueDim, p.valueDim, Rounded(NOT_A_NUMBER, p.type));
        }
    }
    return c;
}

// By definition; with `rounded` every product and weight is rounded to the inputs' type, as eager code in that type does.
std::vector<double> NaiveAttention(const AttentionCase& c, bool rounded)
{
    const SparseAttentionProblem& p = c.p;
    const auto narrow = [&](double value) { return rounded ? Round(value, p.type) : value; };
    std::vector<double> out(size_t(p.batch) * p.queries * p.queryHeads * p.valueDim);
    const uint32_t group = p.queryHeads / p.keyHeads;
    for (uint32_t b = 0; b < p.batch; ++b) {
        for (uint32_t h = 0; h < p.queryHeads; ++h) {
            for (uint32_t t = 0; t < p.queries; ++t) {
                const size_t row = c.SupportRow(b, h / group, t / p.block);
                const uint16_t* q = &c.q[((size_t(b) * p.queryHeads + h) * p.queries + t) * p.dim];
                std::vector<double> weights;
                std::vector<const uint16_t*> values;
                for (int32_t i = 0; i < c.count[row]; ++i) {
                    const uint32_t s = c.indices[row * p.width + i];
                    if (s > p.keys - p.queries + t) {
                        break;
                    }
                    const size_t key = c.KeyRow(b, h / group, s);
                    double score = 0;
                    for (uint32_t d = 0; d < p.dim; ++d) {
                        score += double(Widened(q[d], p.type)) * Widened(c.k[key * p.dim + d], p.type);
                    }
                    weights.push_back(narrow(narrow(score) * p.scale));
                    values.push_back(&c.v[key * p.valueDim]);
                }
                double* o = &out[((size_t(b) * p.queries + t) * p.queryHeads + h) * p.valueDim];
                if (weights.empty()) {
                    continue;
                }
                const double highest = *std::max_element(weights.begin(), weights.end());
                double sum = 0;
                for (double& weight : weights) {
                    sum += weight = std::exp(weight - highest);
                }
                for (size_t i = 0; i < weights.size(); ++i) {
                    const double weight = narrow(weights[i] / sum);
                    for (uint32_t d = 0; d < p.valueDim; ++d) {
                        o[d] += weight * Widened(values[i][d], p.type);
                    }
                }
                for (uint32_t d = 0; d < p.valueDim; ++d) {
                    o[d] = narrow(o[d]);
                }
            }
        }
    }
    return out;
}

struct Run {
    uint64_t seed = 0;
    uint32_t cores = 2;
};

emulation::LaunchOptions Options(const Run& run, const char* kernel, uint32_t blocks)
{
    emulation::LaunchOptions options;
    options.kernel = kernel;
    options.blocks = blocks;
    options.entry = true;
    options.cardCores = run.cores;
    options.seed = run.seed;
    return options;
}

template <typename T>
emulation::GmArgument In(const std::vector<T>& values, const char* name)
{
    return Gm(values.empty() ? nullptr : values.data(), values.size() * sizeof(T), name, GmUse::Read);
}

template <typename T>
emulation::GmArgument Out(const std::vector<T>& values, const char* name)
{
    return Gm(values.data(), values.size() * sizeof(T), name, GmUse::Write);
}

std::vector<uint16_t> LaunchAttention(const AttentionCase& c, const Run& run = {})
{
    const std::string refusal = CheckSparseAttention(c.p);
    Require(refusal.empty(), refusal);
    Hardware hardware;
    hardware.cores = run.cores;
    const SparseAttentionTiling tiling = MakeSparseAttentionTiling(c.p, hardware);
    std::vector<uint16_t> out(size_t(c.p.batch) * c.p.queries * c.p.queryHeads * c.p.valueDim);
    emulation::Launch(Options(run, "sparse_attention", SparseAttentionBlocks(tiling)), npu_sparse_sparse_attention, In(c.q, "q"),
                      In(c.k, "k"), In(c.v, "v"), In(c.indices, "indices"), In(c.count, "count"),
                      Gm(nullptr, 0, "positions", GmUse::Read), Out(out, "out"),
                      Gm(nullptr, SparseAttentionWorkspace(tiling), "workspace", GmUse::Workspace),
                      tiling);
    return out;
}

void CheckAttention(const AttentionCase& c, const Run& run = {})
{
    const std::vector<uint16_t> out = LaunchAttention(c, run);
    std::vector<double> actual(out.size());
    std::transform(out.begin(), out.end(), actual.begin(), [&](uint16_t bits) { return double(Widened(bits, c.p.type)); });
    RequireAccurate(actual, NaiveAttention(c, false), NaiveAttention(c, true), c.p.type, true, c.Text());
}

SparseAttentionProblem Attention(uint32_t Tq, uint32_t Tk, uint32_t block, uint32_t width, uint32_t D = 64, uint32_t Dv = 64,
                                 uint32_t Hq = 4, uint32_t Hkv = 2, uint32_t B = 1, uint32_t Hs = 1, uint32_t type = FLOAT16)
{
    return {B, Hq, Hkv, Tq, Tk, D, Dv, Hs, width, block, type, 1.0f / std::sqrt(float(D))};
}

void AttentionShapes(uint64_t seed)
{
    for (uint32_t i = 0; i < 20; ++i) {
        Random random(seed * 1000 + i);
        const uint32_t group = random.OneOf({1u, 2u, 3u, 4u, 5u, 8u}), Hkv = random.OneOf({1u, 2u, 3u});
        const uint32_t Tq = random.Between(1, 90), Tk = Tq + random.OneOf({0u, 1u, 17u, 200u});
        const uint32_t block = random.OneOf({1u, 2u, 3u, 7u, 16u, 33u, 64u, 128u});
        SparseAttentionProblem p = Attention(Tq, Tk, block, random.Between(1, 300), random.Between(1, 16) * 16,
                                             random.Between(1, 16) * 16, group * Hkv, Hkv, random.Between(1, 2),
                                             random.OneOf({1u, Hkv}), random.OneOf<uint32_t>({FLOAT16, BFLOAT16}));
        CheckAttention(MakeAttentionCase(p, seed * 1000 + i), {0, random.Between(1, 3)});
    }
}

void AttentionTuned(uint64_t seed)
{
    for (uint32_t dim : {64u, 128u, 256u}) {
        for (uint32_t type : {FLOAT16, BFLOAT16}) {
            CheckAttention(MakeAttentionCase(Attention(64, 400, 64, 320, dim, dim, 8, 2, 1, 2, type), seed));
        }
    }
    // keys near and far apart, each with a support of its own
    CheckAttention(MakeAttentionCase(Attention(16, 3000, 1, 8, 256, 256, 4, 1), seed, false));
}

void AttentionLengths(uint64_t seed)
{
    for (uint32_t length : {1u, 63u, 64u, 65u}) {
        for (uint32_t block : {1u, 16u, 64u}) {
            CheckAttention(MakeAttentionCase(Attention(length, length, block, length), seed));
            CheckAttention(MakeAttentionCase(Attention(1, length, block, length), seed));
        }
    }
}

// Every key selected, so that each query masks exactly the keys after it: the causal mask does all the work.
void AttentionCausal(uint64_t seed)
{
    for (uint32_t block : {1u, 5u, 64u}) {
        AttentionCase c = MakeAttentionCase(Attention(70, 150, block, 150), seed);
        Random random(seed);
        c.k = random.Normal(c.k.size(), c.p.type);
        c.v = random.Normal(c.v.size(), c.p.type);
        for (uint32_t n = 0; n < c.Blocks(); ++n) {
            c.count[n] = 80 + std::min((n + 1) * block, 70u);
            for (int32_t i = 0; i < c.count[n]; ++i) {
                c.indices[n * 150 + i] = i;
            }
        }
        CheckAttention(c);
    }
}

// A selected key that only the last tile of its block sees may hold anything: the tiles before it do not read it.
void AttentionFuture(uint64_t seed)
{
    for (uint32_t dim : {64u, 256u}) {
        AttentionCase c = MakeAttentionCase(Attention(128, 128, 128, 128, dim, dim, 16, 1), seed);
        Random random(seed);
        c.k = random.Normal(c.k.size(), c.p.type);
        c.v = random.Normal(c.v.size(), c.p.type);
        c.count[0] = 128;
        for (int32_t i = 0; i < 128; ++i) {
            c.indices[i] = i;
        }
        const std::vector<uint16_t> clean = LaunchAttention(c);
        std::fill_n(c.k.end() - dim, dim, Rounded(NOT_A_NUMBER, c.p.type));
        std::fill_n(c.v.end() - dim, dim, Rounded(NOT_A_NUMBER, c.p.type));
        const std::vector<uint16_t> poisoned = LaunchAttention(c);
        const size_t before = size_t(112) * 16 * dim;  // tiles of 16 tokens x 16 heads
        Require(std::equal(clean.begin(), clean.begin() + before, poisoned.begin()), "a key of the future must not be read");
        Require(std::isnan(Widened(poisoned.back(), c.p.type)), "the query that sees the key must be NaN");
    }
}

void AttentionEmpty(uint64_t seed)
{
    for (uint32_t block : {1u, 4u, 64u}) {
        AttentionCase c = MakeAttentionCase(Attention(37, 37, block, 5), seed);
        std::fill(c.count.begin(), c.count.end(), 0);
        std::fill(c.indices.begin(), c.indices.end(), INT32_MAX);
        for (uint16_t bits : LaunchAttention(c)) {
            Require(bits == 0, "an empty support must give zeros, got " + std::to_string(Widened(bits, c.p.type)));
        }
        // a block that selects only its last position: its other queries see nothing
        for (uint32_t n = 0; n < c.Blocks(); ++n) {
            c.count[n] = 1;
            c.indices[n * 5] = std::min((n + 1) * block, 37u) - 1;
        }
        c.k = Random(seed).Normal(c.k.size(), c.p.type);
        c.v = Random(seed + 1).Normal(c.v.size(), c.p.type);
        CheckAttention(c);
    }
}

template <typename Launch>
void RequireSameForSeeds(Launch launch, uint64_t seeds)
{
    const auto first = launch(Run{1, 3});
    for (uint64_t seed = 2; seed <= seeds; ++seed) {
        Require(launch(Run{seed, 3}) == first, "seed " + std::to_string(seed) + " must give the bits of seed 1");
    }
}

// One copy may bring two runs. However long and far apart they are, what is gathered is the same keys side by side, to the bit.
void AttentionGather(uint64_t seed)
{
    for (uint32_t dim : {256u, 48u}) {
        Random random(seed + dim);
        const uint32_t farthest = 65535 / (dim / 2);  // of the beginnings of two runs that a copy brings
        std::vector<int32_t> chosen;
        for (uint32_t key = 0; chosen.size() < 300;) {
            for (uint32_t run = random.OneOf({1u, 1u, 2u, 2u, 3u, 4u, 5u, 9u, 30u}); run > 0; --run) {
                chosen.push_back(static_cast<int32_t>(key++));
            }
            key += random.OneOf({1u, 2u, 5u, farthest - 2, farthest - 1, farthest, farthest + 1});
        }
        const uint32_t width = chosen.size(), far = chosen.back() + 1;
        AttentionCase near{Attention(4, width + 4, 4, width, dim, dim, 4, 1, 1, 1, BFLOAT16), {}, {}, {}, {}, {int32_t(width)}};
        near.q = random.Normal(size_t(16) * dim, BFLOAT16);
        near.k = random.Normal(size_t(width + 4) * dim, BFLOAT16);
        near.v = random.Normal(size_t(width + 4) * dim, BFLOAT16);
        AttentionCase apart = near;
        apart.p.keys = far + 4;
        apart.k.assign(size_t(far + 4) * dim, Rounded(NOT_A_NUMBER, BFLOAT16));
        apart.v = apart.k;
        apart.indices = chosen;
        for (uint32_t i = 0; i < width; ++i) {
            near.indices.push_back(i);
            std::copy_n(near.k.begin() + i * dim, dim, apart.k.begin() + size_t(chosen[i]) * dim);
            std::copy_n(near.v.begin() + i * dim, dim, apart.v.begin() + size_t(chosen[i]) * dim);
        }
        CheckAttention(near);
        Require(LaunchAttention(apart) == LaunchAttention(near), apart.Text() + ": must give the bits of the keys side by side");
    }
}

void AttentionSeeds(uint64_t seed)
{
    const AttentionCase c = MakeAttentionCase(Attention(70, 300, 64, 260, 32, 48, 8, 2, 1, 2), seed);  // tiles of two parts
    CheckAttention(c, {1, 3});
    RequireSameForSeeds([&](const Run& run) { return LaunchAttention(c, run); }, 100);
}

// attention_mass

struct MassCase {
    AttentionMassProblem p;
    std::vector<uint16_t> q, k;
    std::vector<uint8_t> valid;  // empty: all

    std::string Text() const
    {
        char text[200];
        std::snprintf(text, sizeof text, "B %u Hq %u Hkv %u Tq %u Tk %u D %u block %u mean %u per_kv %u valid %u type %u",
                      p.batch, p.queryHeads, p.keyHeads, p.queries, p.keys, p.dim, p.block, p.reduceMean, p.perKv, p.hasValid,
                      p.type);
        return text;
    }
    uint32_t Heads() const { return p.perKv ? p.keyHeads : 1; }
    uint32_t Blocks() const { return CeilDiv(p.queries, p.block); }
    bool Sees(uint32_t b, uint32_t t, uint32_t s) const
    {
        const uint32_t position = p.keys - p.queries + t;
        return s <= position && (valid.empty() || (valid[b * p.keys + s] && valid[b * p.keys + position]));
    }
};

MassCase MakeMassCase(AttentionMassProblem p, uint64_t seed)
{
    Random random(seed);
    MassCase c{p, random.Normal(size_t(p.batch) * p.queryHeads * p.queries * p.dim, p.type),
               random.Normal(size_t(p.batch) * p.keyHeads * p.keys * p.dim, p.type), {}};
    if (p.hasValid) {
        c.valid.assign(size_t(p.batch) * p.keys, 1);
        for (uint32_t b = 0; b < p.batch; ++b) {
            const uint32_t missing = random.Between(0, p.keys - 1);
            const bool left = random.Between(0, 1);
            for (uint32_t s = 0; s < p.keys; ++s) {
                if (left ? s < missing : s >= p.keys - missing) {
                    c.valid[b * p.keys + s] = 0;
                    for (uint32_t h = 0; h < p.keyHeads; ++h) {
                        std::fill_n(c.k.begin() + ((size_t(b) * p.keyHeads + h) * p.keys + s) * p.dim, p.dim,
                                    Rounded(NOT_A_NUMBER, p.type));
                    }
                }
            }
        }
    }
    return c;
}

// By definition, in Real.
template <typename Real>
std::vector<double> NaiveMass(const MassCase& c)
{
    const AttentionMassProblem& p = c.p;
    const uint32_t group = p.queryHeads / p.keyHeads, heads = p.queryHeads / c.Heads();
    std::vector<double> mass(size_t(p.batch) * c.Heads() * c.Blocks() * p.keys);
    for (uint32_t b = 0; b < p.batch; ++b) {
        for (uint32_t out = 0; out < c.Heads(); ++out) {
            for (uint32_t n = 0; n < c.Blocks(); ++n) {
                std::vector<Real> row(p.keys);
                uint32_t live = 0;
                for (uint32_t t = n * p.block; t < std::min((n + 1) * p.block, p.queries); ++t) {
                    std::vector<Real> shares(p.keys);
                    live += c.Sees(b, t, p.keys - p.queries + t);
                    for (uint32_t h = out * heads; h < (out + 1) * heads; ++h) {
                        std::vector<Real> scores(p.keys, 0);
                        Real highest = -std::numeric_limits<Real>::infinity(), sum = 0;
                        for (uint32_t s = 0; s < p.keys; ++s) {
                            if (c.Sees(b, t, s)) {
                                const uint16_t* q = &c.q[((size_t(b) * p.queryHeads + h) * p.queries + t) * p.dim];
                                const uint16_t* k = &c.k[((size_t(b) * p.keyHeads + h / group) * p.keys + s) * p.dim];
                                for (uint32_t d = 0; d < p.dim; ++d) {
                                    scores[s] += Real(Widened(q[d], p.type)) * Widened(k[d], p.type);
                                }
                                scores[s] *= p.scale;
                                highest = std::max(highest, scores[s]);
                            }
                        }
                        for (uint32_t s = 0; s < p.keys; ++s) {
                            scores[s] = c.Sees(b, t, s) ? std::exp(scores[s] - highest) : 0;
                            sum += scores[s];
                        }
                        for (uint32_t s = 0; s < p.keys && sum > 0; ++s) {
                            shares[s] += scores[s] / sum / heads;
                        }
                    }
                    for (uint32_t s = 0; s < p.keys; ++s) {
                        row[s] = p.reduceMean ? row[s] + shares[s] : std::max(row[s], shares[s]);
                    }
                }
                for (uint32_t s = 0; s < p.keys; ++s) {
                    const Real divisor = p.reduceMean ? std::max(live, 1u) : 1;
                    mass[((size_t(b) * c.Heads() + out) * c.Blocks() + n) * p.keys + s] = row[s] / divisor;
                }
            }
        }
    }
    return mass;
}

std::vector<float> LaunchMass(const MassCase& c, const Run& run = {})
{
    const std::string refusal = CheckAttentionMass(c.p);
    Require(refusal.empty(), refusal);
    Hardware hardware;
    hardware.cores = run.cores;
    const AttentionMassTiling tiling = MakeAttentionMassTiling(c.p, hardware);
    std::vector<float> mass(size_t(c.p.batch) * c.Heads() * c.Blocks() * c.p.keys);
    emulation::Launch(Options(run, "attention_mass", AttentionMassBlocks(tiling)), npu_sparse_attention_mass, In(c.q, "q"),
                      In(c.k, "k"), In(c.valid, "valid"), Out(mass, "mass"),
                      Gm(nullptr, AttentionMassWorkspace(tiling), "workspace", GmUse::Workspace),
                      tiling);
    return mass;
}

void CheckMass(const MassCase& c, const Run& run = {})
{
    const std::vector<float> mass = LaunchMass(c, run);
    RequireAccurate({mass.begin(), mass.end()}, NaiveMass<double>(c), NaiveMass<float>(c), c.p.type, false, c.Text());
}

AttentionMassProblem Mass(uint32_t Tq, uint32_t Tk, uint32_t block, uint32_t mean = 0, uint32_t perKv = 0, uint32_t valid = 0,
                          uint32_t D = 64, uint32_t Hq = 4, uint32_t Hkv = 2, uint32_t B = 1, uint32_t type = FLOAT16)
{
    return {B, Hq, Hkv, Tq, Tk, D, block, mean, perKv, valid, type, 1.0f / std::sqrt(float(D))};
}

void MassShapes(uint64_t seed)
{
    for (uint32_t i = 0; i < 20; ++i) {
        Random random(seed * 1000 + i);
        const uint32_t group = random.OneOf({1u, 2u, 3u, 4u, 5u, 8u, 40u}), Hkv = random.OneOf({1u, 2u, 3u});
        const uint32_t Tq = random.Between(1, group > 8 ? 9 : 80), Tk = Tq + random.OneOf({0u, 1u, 17u, 200u});
        const AttentionMassProblem p =
            Mass(Tq, Tk, random.OneOf({1u, 2u, 3u, 7u, 16u, 33u, 64u, 128u}), random.Between(0, 1), random.Between(0, 1),
                 random.Between(0, 1), random.Between(1, 16) * 16, group * Hkv, Hkv, random.Between(1, 2),
                 random.OneOf<uint32_t>({FLOAT16, BFLOAT16}));
        CheckMass(MakeMassCase(p, seed * 1000 + i), {0, random.Between(1, 3)});
    }
}

void MassLengths(uint64_t seed)
{
    for (uint32_t length : {1u, 63u, 64u, 65u}) {
        for (uint32_t block : {1u, 16u, 64u}) {
            CheckMass(MakeMassCase(Mass(length, length, block), seed));
            CheckMass(MakeMassCase(Mass(1, length, block, 1, 1), seed));
        }
    }
}

void MassTuned(uint64_t seed)
{
    for (uint32_t dim : {128u, 256u}) {
        for (uint32_t type : {FLOAT16, BFLOAT16}) {
            CheckMass(MakeMassCase(Mass(64, 300, 64, 0, 0, 0, dim, 8, 2, 1, type), seed));
        }
    }
}

void MassPadding(uint64_t seed)
{
    for (uint32_t mean : {0u, 1u}) {
        for (uint32_t block : {1u, 5u, 64u}) {
            CheckMass(MakeMassCase(Mass(70, 150, block, mean, mean, 1, 32, 4, 2, 3), seed + block));
        }
    }
}

void MassSeeds(uint64_t seed)
{
    const MassCase c = MakeMassCase(Mass(40, 170, 8, 1, 0, 1, 32), seed);
    CheckMass(c, {1, 3});
    RequireSameForSeeds([&](const Run& run) { return LaunchMass(c, run); }, 100);
}

void Limits(uint64_t)
{
    const auto attention = [](auto change) {
        SparseAttentionProblem p = Attention(8, 8, 4, 8);
        change(p);
        return CheckSparseAttention(p);
    };
    const auto mass = [](auto change) {
        AttentionMassProblem p = Mass(8, 8, 4);
        change(p);
        return CheckAttentionMass(p);
    };
    const std::vector<std::pair<std::string, std::string>> refusals = {
        {attention([](auto&) {}), ""},
        {attention([](auto& p) { p.dim = 24; }), "D must be a multiple of 16 from 16 to 256, got 24 (nearest: 32)"},
        {attention([](auto& p) { p.valueDim = 512; }), "Dv must be a multiple of 16 from 16 to 256, got 512 (nearest: 256)"},
        {attention([](auto& p) { p.block = 129; }), "block must be from 1 to 128, got 129 (nearest: 128)"},
        {attention([](auto& p) { p.queryHeads = 5; }), "query heads must be a multiple of the 2 KV heads, got 5"},
        {attention([](auto& p) { p.queryHeads = 258; }), "query heads per KV head must be from 1 to 128, got 129 (nearest: 128)"},
        {attention([](auto& p) { p.queries = 9; }), "Tq must be at most Tk = 8, got 9"},
        {attention([](auto& p) { p.supportHeads = 3; }), "support heads must be 1 or Hkv = 2, got 3"},
        {mass([](auto&) {}), ""},
        {mass([](auto& p) { p.dim = 8; }), "D must be a multiple of 16 from 16 to 256, got 8 (nearest: 16)"},
        {mass([](auto& p) { p.block = 0; }), "reduce_block must be from 1 to 128, got 0 (nearest: 1)"},
        {mass([](auto& p) { p.queries = 9; }), "Tq must be at most Tk = 8, got 9"},
    };
    for (const auto& [actual, expected] : refusals) {
        Require(actual == expected, "the refusal must be '" + expected + "', got '" + actual + "'");
    }
}

}  // namespace

int main(int argc, char** argv)
{
    const std::map<std::string, std::function<void(uint64_t)>> checks = {
        {"attention_shapes", AttentionShapes}, {"attention_tuned", AttentionTuned},   {"attention_lengths", AttentionLengths},
        {"attention_causal", AttentionCausal}, {"attention_empty", AttentionEmpty},   {"attention_future", AttentionFuture},
        {"attention_seeds", AttentionSeeds},   {"attention_gather", AttentionGather},
        {"mass_shapes", MassShapes},           {"mass_tuned", MassTuned},             {"mass_lengths", MassLengths},
        {"mass_padding", MassPadding},         {"mass_seeds", MassSeeds},             {"limits", Limits},
    };
    const auto check = argc > 1 ? checks.find(argv[1]) : checks.end();
    if (check == checks.end()) {
        std::fprintf(stderr, "usage: attention <check> [seed], check one of:\n");
        for (const auto& [name, run] : checks) {
            std::fprintf(stderr, "  %s\n", name.c_str());
        }
        return 2;
    }
    try {
        check->second(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
        return 1;
    }
    return 0;
}
