// Runs index_scores, select_tokens and select_by_index on the host emulation against definitions in fp64, test by test:
// `indexer <test>` prints one line and returns 0, or says what differs and returns 1.
#include <cstdio>
#include <cstring>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "../index_partition/index_partition.h"
#include "../index_partition/tiling.h"
#include "../index_scores/index_scores.h"
#include "../index_scores/tiling.h"
#include "../select_by_index/select_by_index.h"
#include "../select_by_index/tiling.h"
#include "../select_tokens/select_tokens.h"
#include "../select_tokens/tiling.h"
#include "emulation/launch.h"

using namespace npu_sparse_ascendc;

namespace {

enum class Side { NONE, LEFT, RIGHT, HOLES };
enum class Values { NORMAL, INTEGERS, FEW };  // integers make every score exact; few of them make ties

struct Case {
    uint32_t B = 1, Hi = 1, Tq = 37, Tk = 37, Di = 64, block = 1;
    bool mean = false, weighted = false, bfloat16 = false;
    bool normal = false;  // scores are less each query's own log-partition, which is far from the exact one
    Side side = Side::NONE;
    uint32_t k = 8, sink = 0, recent = 0;
    Values values = Values::NORMAL;
    uint32_t cores = 2;
    uint64_t seed = 0;

    std::string Name() const
    {
        char text[256];
        std::snprintf(text, sizeof text,
                      "B=%u Hi=%u Tq=%u Tk=%u Di=%u block=%u mean=%d normal=%d weighted=%d bf16=%d side=%d k=%u sink=%u recent=%u "
                      "values=%d cores=%u seed=%llu",
                      B, Hi, Tq, Tk, Di, block, mean, normal, weighted, bfloat16, static_cast<int>(side), k, sink, recent,
                      static_cast<int>(values), cores, static_cast<unsigned long long>(seed));
        return text;
    }
    uint32_t Rows() const { return (Tq + block - 1) / block; }
};

void Expect(bool fact, const std::string& sentence)
{
    if (!fact) {
        throw std::runtime_error(sentence);
    }
}

uint16_t Bits(float value, bool bfloat16)
{
    uint16_t bits;
    if (bfloat16) {
        const bfloat16_t rounded = AscendC::ToBfloat16(value);
        std::memcpy(&bits, &rounded, 2);
    } else {
        const half rounded = static_cast<half>(value);
        std::memcpy(&bits, &rounded, 2);
    }
    return bits;
}

double Value(uint16_t bits, bool bfloat16)
{
    if (bfloat16) {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    half value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}

struct Inputs {
    std::vector<uint16_t> qi, ki, w;
    std::vector<uint8_t> valid;
    std::vector<float> partition;

    explicit Inputs(const Case& c)
    {
        std::mt19937_64 random(c.seed * 7919 + 17);
        std::normal_distribution<float> normal;
        const int largest = c.values == Values::FEW ? 1 : 40;
        std::uniform_int_distribution<int> integer(-largest, largest);
        std::uniform_int_distribution<int> weight(-2, 3);
        const auto draw = [&] { return c.values == Values::NORMAL ? normal(random) : static_cast<float>(integer(random)); };
        qi.resize(static_cast<size_t>(c.B) * c.Hi * c.Tq * c.Di);
        ki.resize(static_cast<size_t>(c.B) * c.Tk * c.Di);
        for (auto* tensor : {&qi, &ki}) {
            for (uint16_t& element : *tensor) {
                element = Bits(draw(), c.bfloat16);
            }
        }
        if (c.weighted) {
            w.resize(static_cast<size_t>(c.B) * c.Tq * c.Hi);
            for (uint16_t& element : w) {
                element = Bits(c.values == Values::NORMAL ? normal(random) : static_cast<float>(weight(random)), c.bfloat16);
            }
        }
        if (c.normal) {
            partition.resize(static_cast<size_t>(c.B) * c.Tq);
            for (float& own : partition) {  // quarters are exact
                own = c.values == Values::NORMAL ? 3 * normal(random) : static_cast<float>(integer(random)) / 4;
            }
        }
        if (c.side != Side::NONE) {
            valid.assign(static_cast<size_t>(c.B) * c.Tk, 1);
            for (uint32_t b = 0; b < c.B; b++) {
                const uint32_t missing = (b * 5 + c.seed * 3 + 2) % (c.Tk + 1) / 2;
                for (uint32_t i = 0; i < c.Tk; i++) {
                    const bool hole = c.side == Side::LEFT    ? i < missing
                                      : c.side == Side::RIGHT ? i >= c.Tk - missing
                                                              : random() % 4 == 0;
                    valid[static_cast<size_t>(b) * c.Tk + i] = !hole;
                }
            }
        }
    }

    bool Valid(const Case& c, uint32_t b, uint32_t key) const
    {
        return valid.empty() || valid[static_cast<size_t>(b) * c.Tk + key];
    }
    double Weight(const Case& c, uint32_t b, uint32_t t, uint32_t h) const
    {
        return c.weighted ? Value(w[(static_cast<size_t>(b) * c.Tq + t) * c.Hi + h], c.bfloat16) : 1.0;
    }
};

// ---- definitions in fp64 ----

constexpr double UNSEEN = -std::numeric_limits<double>::infinity();

std::vector<double> NaiveScores(const Case& c, const Inputs& in)
{
    std::vector<double> scores(static_cast<size_t>(c.B) * c.Rows() * c.Tk, UNSEEN);
    std::vector<double> q(in.qi.size()), k(in.ki.size());
    for (size_t i = 0; i < q.size(); i++) {
        q[i] = Value(in.qi[i], c.bfloat16);
    }
    for (size_t i = 0; i < k.size(); i++) {
        k[i] = Value(in.ki[i], c.bfloat16);
    }
    for (uint32_t b = 0; b < c.B; b++) {
        for (uint32_t row = 0; row < c.Rows(); row++) {
            double* out = &scores[(static_cast<size_t>(b) * c.Rows() + row) * c.Tk];
            std::vector<double> total(c.Tk, 0.0);
            std::vector<bool> seen(c.Tk, false);
            uint32_t live = 0;
            for (uint32_t t = row * c.block; t < std::min(c.Tq, (row + 1) * c.block); t++) {
                const uint32_t position = c.Tk - c.Tq + t;
                if (!in.Valid(c, b, position)) {
                    continue;
                }
                live++;
                std::vector<double> z(position + 1, UNSEEN);
                for (uint32_t s = 0; s <= position; s++) {
                    if (!in.Valid(c, b, s)) {
                        continue;
                    }
                    seen[s] = true;
                    z[s] = 0;
                    for (uint32_t h = 0; h < c.Hi; h++) {
                        double dot = 0;
                        for (uint32_t d = 0; d < c.Di; d++) {
                            dot += q[((static_cast<size_t>(b) * c.Hi + h) * c.Tq + t) * c.Di + d] *
                                   k[(static_cast<size_t>(b) * c.Tk + s) * c.Di + d];
                        }
                        z[s] += in.Weight(c, b, t, h) * std::max(0.0, dot / std::sqrt(static_cast<double>(c.Di)));
                    }
                    if (c.normal) {
                        z[s] -= in.partition[static_cast<size_t>(b) * c.Tq + t];
                    }
                    if (!c.mean) {
                        out[s] = std::max(out[s], z[s]);
                    }
                }
                if (c.mean) {
                    const double largest = *std::max_element(z.begin(), z.end());
                    double sum = 0;
                    for (const double value : z) {
                        sum += std::exp(value - largest);
                    }
                    for (uint32_t s = 0; s <= position; s++) {
                        total[s] += std::exp(z[s] - largest) / sum;
                    }
                }
            }
            for (uint32_t s = 0; c.mean && s < c.Tk; s++) {
                out[s] = seen[s] ? total[s] / live : UNSEEN;
            }
        }
    }
    return scores;
}

// The Support of rows of scores [B, Hs, Nq, Tk], one ascending list per row.
std::vector<std::vector<int32_t>> NaiveSelection(const Case& c, uint32_t heads, const std::vector<double>& scores,
                                                 const std::vector<uint8_t>& valid)
{
    std::vector<std::vector<int32_t>> rows;
    for (size_t index = 0; index < static_cast<size_t>(c.B) * heads * c.Rows(); index++) {
        const uint32_t b = index / (heads * c.Rows());
        const uint32_t row = index % c.Rows();
        const int64_t first = c.Tk - c.Tq + static_cast<int64_t>(row) * c.block;
        const int64_t last = c.Tk - c.Tq + std::min(c.Tq, (row + 1) * c.block) - 1;
        std::vector<std::pair<double, int32_t>> order;
        uint32_t rank = 0;
        for (uint32_t s = 0; s < c.Tk; s++) {
            const bool isValid = valid.empty() || valid[static_cast<size_t>(b) * c.Tk + s];
            double score = scores[index * c.Tk + s];
            const bool kept = (isValid && rank < c.sink) || (c.recent && s > first - c.recent && s <= last);
            if (score > UNSEEN) {
                order.emplace_back(kept ? -std::numeric_limits<double>::infinity() : -score, s);
            }
            rank += isValid;
        }
        std::sort(order.begin(), order.end());
        order.resize(std::min<size_t>(order.size(), std::min(c.k, c.Tk)));
        rows.emplace_back();
        for (const auto& entry : order) {
            rows.back().push_back(entry.second);
        }
        std::sort(rows.back().begin(), rows.back().end());
    }
    return rows;
}

// ---- kernels on the emulation ----

ScoreProblem Score(const Case& c)
{
    ScoreProblem p;
    p.batch = c.B;
    p.heads = c.Hi;
    p.queries = c.Tq;
    p.keys = c.Tk;
    p.dim = c.Di;
    p.block = c.block;
    p.mean = c.mean;
    p.hasWeights = c.weighted;
    p.hasValid = c.side != Side::NONE;
    p.hasPartition = c.normal;
    p.dtype = c.bfloat16 ? BFLOAT16 : FLOAT16;
    return p;
}

template <typename T>
emulation::GmArgument Read(const std::vector<T>& values, const char* name)
{
    return emulation::Gm(values.data(), values.size() * sizeof(T), name, emulation::GmUse::Read);
}

template <typename T>
emulation::GmArgument Write(std::vector<T>& values, const char* name)
{
    return emulation::Gm(values.data(), values.size() * sizeof(T), name, emulation::GmUse::Write);
}

emulation::GmArgument Workspace(uint64_t bytes)
{
    return emulation::Gm(nullptr, bytes, "workspace", emulation::GmUse::Workspace);
}

Hardware Card(const Case& c)
{
    Hardware hardware;
    hardware.cores = c.cores;
    return hardware;
}

std::vector<float> RunScores(const Case& c, const Inputs& in, uint64_t seed = 0)
{
    const IndexScoresProblem problem = Score(c);
    Expect(CheckIndexScores(problem).empty(), CheckIndexScores(problem));
    const IndexScoresTiling tiling = MakeIndexScoresTiling(problem, Card(c));
    std::vector<float> scores(static_cast<size_t>(c.B) * c.Rows() * c.Tk, 12345.0f);
    emulation::LaunchOptions options;
    options.kernel = "index_scores";
    options.entry = true;
    options.cardCores = c.cores;
    options.blocks = IndexScoresBlocks(tiling);
    options.seed = seed;
    emulation::Launch(options, npu_sparse_index_scores, Read(in.qi, "qi"), Read(in.ki, "ki"), Read(in.w, "w"),
                      Read(in.valid, "valid"), Read(in.partition, "partition"), Write(scores, "scores"),
                      Workspace(IndexScoresWorkspace(tiling)), tiling);
    return scores;
}

struct Selection {
    std::vector<int32_t> indices, count;
    uint32_t width;

    Selection(size_t rows, uint32_t slots) : indices(rows * slots, 77777), count(rows, 77777), width(slots) {}
};

Selection RunFused(const Case& c, const Inputs& in, uint64_t seed = 0)
{
    SelectByIndexProblem problem;
    static_cast<ScoreProblem&>(problem) = Score(c);
    problem.k = c.k;
    problem.sink = c.sink;
    problem.recent = c.recent;
    Expect(CheckSelectByIndex(problem).empty(), CheckSelectByIndex(problem));
    const SelectByIndexTiling tiling = MakeSelectByIndexTiling(problem, Card(c));
    Selection selection(static_cast<size_t>(c.B) * c.Rows(), std::min(c.k, c.Tk));
    emulation::LaunchOptions options;
    options.kernel = "select_by_index";
    options.entry = true;
    options.cardCores = c.cores;
    options.blocks = SelectByIndexBlocks(tiling);
    options.seed = seed;
    emulation::Launch(options, npu_sparse_select_by_index, Read(in.qi, "qi"), Read(in.ki, "ki"), Read(in.w, "w"),
                      Read(in.valid, "valid"), Read(in.partition, "partition"), Write(selection.indices, "indices"),
                      Write(selection.count, "count"), Workspace(SelectByIndexWorkspace(tiling)), tiling);
    return selection;
}

Selection RunSelect(const Case& c, uint32_t heads, const std::vector<float>& scores, const std::vector<uint8_t>& valid,
                    uint64_t seed = 0)
{
    SelectTokensProblem problem;
    problem.batch = c.B;
    problem.heads = heads;
    problem.rows = c.Rows();
    problem.queries = c.Tq;
    problem.keys = c.Tk;
    problem.block = c.block;
    problem.k = c.k;
    problem.sink = c.sink;
    problem.recent = c.recent;
    problem.hasValid = !valid.empty();
    Expect(CheckSelectTokens(problem).empty(), CheckSelectTokens(problem));
    const SelectTokensTiling tiling = MakeSelectTokensTiling(problem, Card(c));
    Selection selection(static_cast<size_t>(c.B) * heads * c.Rows(), std::min(c.k, c.Tk));
    emulation::LaunchOptions options;
    options.kernel = "select_tokens";
    options.entry = true;
    options.cardCores = c.cores;
    options.blocks = SelectTokensBlocks(tiling);
    options.type = KERNEL_TYPE_MIX_AIV_1_0;
    options.seed = seed;
    emulation::Launch(options, npu_sparse_select_tokens, Read(scores, "scores"), Read(valid, "valid"),
                      Write(selection.indices, "indices"), Write(selection.count, "count"),
                      Workspace(SelectTokensWorkspace(tiling)), tiling);
    return selection;
}

// ---- facts ----

// RMS of the error relative to the RMS of the exact scores; the same keys must be -inf.
double ScoreError(const Case& c, const std::vector<float>& actual, const std::vector<double>& exact)
{
    double error = 0, size = 0;
    for (size_t i = 0; i < exact.size(); i++) {
        if (exact[i] == UNSEEN) {
            Expect(actual[i] == -std::numeric_limits<float>::infinity(),
                   c.Name() + ": score " + std::to_string(i) + " must be -inf, got " + std::to_string(actual[i]));
        } else {
            error += (actual[i] - exact[i]) * (actual[i] - exact[i]);
            size += exact[i] * exact[i];
        }
    }
    return size > 0 ? std::sqrt(error / size) : std::sqrt(error);
}

void ExpectSelection(const Case& c, const Selection& actual, const std::vector<std::vector<int32_t>>& expected)
{
    for (size_t row = 0; row < expected.size(); row++) {
        const std::vector<int32_t> got(&actual.indices[row * actual.width],
                                       &actual.indices[row * actual.width] +
                                           std::max(0, std::min<int32_t>(actual.count[row], actual.width)));
        if (actual.count[row] == static_cast<int32_t>(expected[row].size()) && got == expected[row]) {
            continue;
        }
        std::string text = c.Name() + ": row " + std::to_string(row) + " must select";
        for (const int32_t key : expected[row]) {
            text += " " + std::to_string(key);
        }
        text += ", got (" + std::to_string(actual.count[row]) + ")";
        for (const int32_t key : got) {
            text += " " + std::to_string(key);
        }
        throw std::runtime_error(text);
    }
}

void CheckScoresOf(const Case& c)
{
    const Inputs in(c);
    const double error = ScoreError(c, RunScores(c, in), NaiveScores(c, in));
    Expect(error < 2e-6, c.Name() + ": RMS error must be below 2e-6, got " + std::to_string(error * 1e6) + "e-6");
}

void CheckFusedOf(const Case& c)
{
    const Inputs in(c);
    ExpectSelection(c, RunFused(c, in), NaiveSelection(c, 1, NaiveScores(c, in), in.valid));
}

void CheckSelectOf(const Case& c, uint32_t heads, uint32_t levels)
{
    const Inputs in(c);
    std::mt19937_64 random(c.seed + 5);
    std::normal_distribution<float> normal;
    std::vector<float> scores;
    for (size_t row = 0; row < static_cast<size_t>(c.B) * heads * c.Rows(); row++) {
        const uint32_t last = c.Tk - c.Tq + std::min(c.Tq, (static_cast<uint32_t>(row % c.Rows()) + 1) * c.block) - 1;
        for (uint32_t s = 0; s < c.Tk; s++) {
            const bool seen = s <= last && in.Valid(c, row / (heads * c.Rows()), s);
            const float value = levels ? static_cast<float>(static_cast<int>(random() % levels) - 1) * 0.5f : normal(random);
            scores.push_back(seen ? value : -std::numeric_limits<float>::infinity());
        }
    }
    const std::vector<double> wide(scores.begin(), scores.end());
    ExpectSelection(c, RunSelect(c, heads, scores, in.valid), NaiveSelection(c, heads, wide, in.valid));
}

Case RandomCase(std::mt19937_64& random, bool exact)
{
    const auto pick = [&](std::initializer_list<uint32_t> choices) { return choices.begin()[random() % choices.size()]; };
    Case c;
    c.B = 1 + random() % 2;
    c.Hi = pick({1, 1, 1, 2, 3, 5});
    c.Tq = 1 + random() % pick({8, 40, 150});
    c.Tk = c.Tq + random() % pick({1, 60, 400});
    c.weighted = random() % 3 == 0;
    // fp32 holds w / sqrt(Di) and its products exactly only where sqrt(Di) is a power of two
    c.Di = exact && (c.weighted || c.Hi > 1) ? pick({16, 64, 256}) : pick({16, 48, 64, 128, 176, 256});
    c.block = pick({1, 1, 2, 5, 8, 16, 37, 64, 128});
    c.side = static_cast<Side>(random() % 6 < 3 ? 0 : 1 + random() % 3);
    c.sink = random() % 4;
    c.recent = random() % 4;
    const uint32_t kept = c.sink + (c.recent ? c.recent + c.block - 1 : 0);
    c.k = std::max(kept, static_cast<uint32_t>(1 + random() % pick({8, 70, 300})));
    c.bfloat16 = random() % 2;
    c.cores = 1 + random() % 3;
    c.values = exact ? Values::INTEGERS : Values::NORMAL;
    c.seed = random() % 1000;
    return c;
}

uint32_t repeats = 0;  // of the random tests, from the command line

Case With(const std::function<void(Case&)>& change)
{
    Case c;
    change(c);
    return c;
}

Case Exact(const std::function<void(Case&)>& change)
{
    Case c = With(change);
    c.values = Values::INTEGERS;
    return c;
}

void ScoresOfRandomShapes()
{
    std::mt19937_64 random(1);
    for (uint32_t i = 0; i < (repeats ? repeats : 40); i++) {
        Case c = RandomCase(random, false);
        c.mean = random() % 2;
        CheckScoresOf(c);
    }
}

void ScoresOfLongRows()
{
    for (const uint32_t block : {1, 2}) {  // steps of 512 keys that end around a query's own position
        CheckScoresOf(With([&](Case& c) { c.Tq = c.Tk = 600, c.Di = 16, c.block = block; }));
    }
    CheckScoresOf(With([](Case& c) { c.Tq = 300, c.Tk = 1500, c.Di = 128, c.block = 128, c.cores = 3; }));
    CheckScoresOf(With([](Case& c) { c.Tq = 9, c.Tk = 2600, c.Di = 256, c.block = 4, c.mean = true, c.side = Side::HOLES; }));
    CheckScoresOf(With([](Case& c) { c.Tq = 64, c.Tk = 700, c.Hi = 40, c.Di = 128, c.block = 64, c.weighted = true; }));
}

void SelectionOfRandomScores()
{
    std::mt19937_64 random(2);
    for (uint32_t i = 0; i < (repeats ? repeats : 40); i++) {
        CheckSelectOf(RandomCase(random, false), 1 + random() % 3, random() % 2 ? 0 : 1 + random() % 3);
    }
}

void SelectionOfLongRows()
{
    CheckSelectOf(With([](Case& c) { c.Tq = 1, c.Tk = 9000, c.k = 2048, c.sink = 4, c.recent = 64; }), 1, 0);
    CheckSelectOf(With([](Case& c) { c.Tq = 2, c.Tk = 13001, c.k = 700, c.cores = 3, c.side = Side::LEFT, c.sink = 5; }), 1, 2);
    CheckSelectOf(With([](Case& c) { c.Tq = 1, c.Tk = 5000, c.k = 4032, c.side = Side::HOLES, c.sink = 9; }), 2, 0);
}

void FusedEqualsTheReferenceSet()
{
    std::mt19937_64 random(3);
    for (uint32_t i = 0; i < (repeats ? repeats : 200); i++) {
        CheckFusedOf(RandomCase(random, true));
    }
}

void FusedOfLongRows()
{
    for (const uint32_t k : {1, 2, 7}) {  // a threshold that most keys of a long row are held against
        CheckFusedOf(Exact([&](Case& c) { c.Tq = 60, c.Tk = 5000, c.Di = 16, c.k = k; }));
    }
    CheckFusedOf(Exact([](Case& c) { c.Tq = 130, c.Tk = 4000, c.Di = 128, c.block = 64, c.k = 1024, c.recent = 7; }));
    CheckFusedOf(Exact([](Case& c) { c.Tq = 3, c.Tk = 9001, c.k = 2048, c.cores = 4, c.sink = 4, c.recent = 64; }));
    CheckFusedOf(Exact([](Case& c) {
        c.Tq = 6, c.Tk = 6001, c.k = 512, c.block = 3, c.cores = 3, c.side = Side::LEFT, c.sink = 4;
    }));
    CheckFusedOf(Exact([](Case& c) { c.Tq = 1, c.Tk = 4500, c.k = 4032, c.cores = 1; }));
    // padding up to key 505: a few candidates of the first step, then a whole step of them
    CheckFusedOf(Exact([](Case& c) { c.Tq = 4, c.Tk = 1300, c.k = 64, c.side = Side::LEFT, c.seed = 336; }));
}

// Full tiles, so that the tiling gives away the last of UB: more than it counts would break the capacity rule.
void FullBuffersFit()
{
    const auto check = [](uint32_t block, uint32_t Hi, uint32_t k, bool mean, Side side) {
        const Case c = Exact([&](Case& c) {
            c.Tq = 256, c.Tk = k + 10, c.Di = 16, c.block = block, c.Hi = Hi, c.k = k, c.mean = mean, c.side = side;
            c.weighted = Hi > 1, c.cores = 3;
        });
        RunFused(c, Inputs(c));
        CheckScoresOf(With([&](Case& scores) { scores = c, scores.Tk = 260, scores.values = Values::NORMAL; }));
        if (!mean) {
            const Case less = Exact([&](Case& less) { less = c, less.normal = true; });
            RunFused(less, Inputs(less));
            CheckScoresOf(With([&](Case& scores) { scores = less, scores.Tk = 260, scores.values = Values::NORMAL; }));
        }
    };
    check(1, 1, 1024, false, Side::NONE);
    check(1, 4, 700, true, Side::LEFT);
    check(16, 1, 2048, false, Side::LEFT);
    check(16, 16, 1024, false, Side::HOLES);
    check(64, 64, 2048, true, Side::LEFT);
    check(128, 1, 4032, false, Side::NONE);
    check(3, 2, 3000, true, Side::RIGHT);
}

// The table of select_by_index/README.md.
void RowsInUbAreThoseOfTheReadme()
{
    const uint32_t ks[] = {1024, 2048, 4032};
    const std::map<uint32_t, std::vector<uint32_t>> rows = {{1, {7, 4, 1}}, {16, {6, 3, 1}}, {64, {2, 2, 1}}, {128, {1, 1, 1}}};
    for (const auto& [block, expected] : rows) {
        for (size_t i = 0; i < expected.size(); i++) {
            SelectByIndexProblem problem;
            problem.queries = problem.keys = 131072;
            problem.block = block;
            problem.k = ks[i];
            const uint32_t got = MakeSelectByIndexTiling(problem, Hardware{}).score.rowsPerSub;
            Expect(got == expected[i], "rows per AIV for block " + std::to_string(block) + ", k " + std::to_string(ks[i]) +
                                           " must be " + std::to_string(expected[i]) + ", got " + std::to_string(got));
        }
    }
}

void TiesGoToTheSmallerPosition()
{
    std::mt19937_64 random(4);
    for (uint32_t i = 0; i < (repeats ? repeats : 40); i++) {
        Case c = RandomCase(random, true);
        c.values = Values::FEW;
        CheckFusedOf(c);
    }
}

void FusedMeanSelectsByItsScores()
{
    std::mt19937_64 random(5);
    for (uint32_t i = 0; i < (repeats ? repeats : 20); i++) {
        Case c = RandomCase(random, false);
        c.mean = true;
        const Inputs in(c);
        const std::vector<float> scores = RunScores(c, in);
        ExpectSelection(c, RunFused(c, in), NaiveSelection(c, 1, {scores.begin(), scores.end()}, in.valid));
    }
}

std::vector<float> RunPartition(const Case& c, const Inputs& in, uint64_t seed = 0)
{
    const IndexPartitionProblem problem = Score(c);
    Expect(CheckIndexPartition(problem).empty(), CheckIndexPartition(problem));
    const IndexPartitionTiling tiling = MakeIndexPartitionTiling(problem, Card(c));
    std::vector<float> partition(static_cast<size_t>(c.B) * c.Tq, 12345.0f);
    emulation::LaunchOptions options;
    options.kernel = "index_partition";
    options.entry = true;
    options.cardCores = c.cores;
    options.blocks = IndexPartitionBlocks(tiling);
    options.seed = seed;
    emulation::Launch(options, npu_sparse_index_partition, Read(in.qi, "qi"), Read(in.ki, "ki"), Read(in.w, "w"),
                      Read(in.valid, "valid"), Write(partition, "partition"), Workspace(IndexPartitionWorkspace(tiling)),
                      tiling);
    return partition;
}

void CheckPartitionOf(const Case& c)
{
    const Inputs in(c);
    const std::vector<float> got = RunPartition(c, in);
    const std::vector<double> scores = NaiveScores(c, in);  // of block 1: every query's own
    for (size_t query = 0; query < got.size(); query++) {
        const double* z = &scores[query * c.Tk];
        const double largest = *std::max_element(z, z + c.Tk);
        double sum = 0;
        for (uint32_t s = 0; s < c.Tk; s++) {
            sum += z[s] > UNSEEN ? std::exp(z[s] - largest) : 0.0;
        }
        const double expected = sum > 0 ? largest + std::log(sum) : UNSEEN;
        const bool same = expected == got[query] || std::fabs(got[query] - expected) <= 2e-6 * (1 + std::fabs(expected));
        Expect(same, c.Name() + ": the log-partition of query " + std::to_string(query) + " must be " + std::to_string(expected) +
                         ", got " + std::to_string(got[query]));
    }
    for (uint64_t seed = 1; seed < 4; seed++) {
        Expect(RunPartition(c, in, seed) == got, c.Name() + ": log-partitions must not depend on the schedule");
    }
}

void PartitionsOfRandomShapes()
{
    std::mt19937_64 random(8);
    for (uint32_t i = 0; i < (repeats ? repeats : 30); i++) {
        Case c = RandomCase(random, false);
        c.block = 1;
        CheckPartitionOf(c);
    }
    CheckPartitionOf(With([](Case& c) { c.Tq = 300, c.Tk = 1500, c.Di = 128, c.cores = 3; }));
    CheckPartitionOf(With([](Case& c) { c.Tq = 9, c.Tk = 2600, c.Di = 256, c.side = Side::HOLES; }));
    CheckPartitionOf(With([](Case& c) { c.Tq = 64, c.Tk = 700, c.Hi = 40, c.weighted = true; }));
}

void ScoresAreLessTheirPartitions()
{
    std::mt19937_64 random(6);
    for (uint32_t i = 0; i < (repeats ? repeats : 40); i++) {
        Case c = RandomCase(random, false);
        c.normal = true;
        CheckScoresOf(c);
    }
    CheckScoresOf(With([](Case& c) { c.Tq = 300, c.Tk = 1500, c.Di = 128, c.block = 128, c.cores = 3, c.normal = true; }));
    CheckScoresOf(With([](Case& c) { c.Tq = 64, c.Tk = 700, c.Hi = 40, c.block = 64, c.weighted = true, c.normal = true; }));
}

void FusedSelectsLessItsPartitions()
{
    std::mt19937_64 random(7);
    for (uint32_t i = 0; i < (repeats ? repeats : 60); i++) {
        Case c = RandomCase(random, true);
        c.Di = c.Di <= 48 ? 16 : c.Di <= 128 ? 64 : 256;  // times its root, quarters are exact
        c.normal = true;
        c.values = i % 2 ? Values::INTEGERS : Values::FEW;
        CheckFusedOf(c);
    }
    CheckFusedOf(Exact([](Case& c) { c.Tq = 130, c.Tk = 4000, c.block = 64, c.k = 1024, c.recent = 7, c.normal = true; }));
    CheckFusedOf(Exact([](Case& c) { c.Tq = 3, c.Tk = 9001, c.k = 2048, c.block = 3, c.cores = 4, c.normal = true; }));  // splits
}

// NaN in padding keys, and in the queries, weights and partitions at their positions, must not change anything.
void CheckHostile(const Case& c)
{
    const Inputs clean(c);
    Inputs hostile(c);
    const auto poison = [&](std::vector<uint16_t>& tensor, size_t at, size_t count) {
        std::fill_n(tensor.begin() + at, count, Bits(std::numeric_limits<float>::quiet_NaN(), c.bfloat16));
    };
    for (uint32_t b = 0; b < c.B; b++) {
        for (uint32_t s = 0; s < c.Tk; s++) {
            if (clean.Valid(c, b, s)) {
                continue;
            }
            poison(hostile.ki, (static_cast<size_t>(b) * c.Tk + s) * c.Di, c.Di);
            if (s >= c.Tk - c.Tq) {
                const uint32_t t = s - (c.Tk - c.Tq);
                poison(hostile.w, (static_cast<size_t>(b) * c.Tq + t) * c.Hi, c.Hi);
                if (c.normal) {
                    hostile.partition[static_cast<size_t>(b) * c.Tq + t] = std::numeric_limits<float>::quiet_NaN();
                }
                for (uint32_t h = 0; h < c.Hi; h++) {
                    poison(hostile.qi, ((static_cast<size_t>(b) * c.Hi + h) * c.Tq + t) * c.Di, c.Di);
                }
            }
        }
    }
    Expect(RunScores(c, hostile) == RunScores(c, clean), c.Name() + ": scores must not depend on invisible NaN");
    const Selection a = RunFused(c, hostile), b = RunFused(c, clean);
    Expect(a.indices == b.indices && a.count == b.count, c.Name() + ": the selection must not depend on invisible NaN");
}

void NanInInvisibleKeysDoesNotLeak()
{
    for (const bool mean : {false, true}) {
        for (const Side side : {Side::LEFT, Side::RIGHT, Side::HOLES}) {
            for (const uint32_t keys : {90, 700}) {  // 700: a whole step lies before every query
                Case c;
                c.B = 2, c.Hi = 2, c.Tq = 70, c.Tk = keys, c.block = 8, c.weighted = true, c.mean = mean, c.side = side;
                c.seed = 8, c.sink = 2, c.recent = 3, c.k = 16;
                CheckHostile(c);
                if (!mean) {
                    c.normal = true;
                    CheckHostile(c);
                }
            }
        }
    }
}

// A key in the future of a block's first query is poison to its later queries only.
void NanInFutureKeysStaysInTheFuture()
{
    for (const bool mean : {false, true}) {
        Case c;
        c.Tq = c.Tk = 40, c.mean = mean;
        const Inputs clean(c);
        Inputs hostile(c);
        std::fill_n(hostile.ki.begin() + 30 * c.Di, c.Di, Bits(std::numeric_limits<float>::quiet_NaN(), c.bfloat16));
        const std::vector<float> expected = RunScores(c, clean), actual = RunScores(c, hostile);
        Expect(std::equal(expected.begin(), expected.begin() + 30 * c.Tk, actual.begin()),
               c.Name() + ": queries before a NaN key must not see it");
    }
}

// Seeds change the order of cores, and of a core's pipes within what its flags allow.
void HundredSeedsAreIdentical()
{
    Case weighted;
    weighted.B = 2, weighted.Hi = 2, weighted.Tq = 40, weighted.Tk = 1300, weighted.block = 16, weighted.k = 48, weighted.sink = 2;
    weighted.recent = 4, weighted.weighted = true, weighted.side = Side::LEFT;
    Case mean;
    mean.Tq = 24, mean.Tk = 700, mean.Di = 144, mean.block = 4, mean.k = 20, mean.mean = true;
    Case split;
    split.Tq = 3, split.Tk = 8200, split.Di = 16, split.k = 100, split.cores = 3;
    const auto same = [](const Selection& a, const Selection& b) { return a.indices == b.indices && a.count == b.count; };
    Case normal = weighted;
    normal.normal = true;
    for (const Case& c : {weighted, mean, split, normal}) {
        const Inputs in(c);
        const std::vector<float> scores = RunScores(c, in);
        const Selection selection = RunFused(c, in);
        for (uint64_t seed = 1; seed < (repeats ? repeats : 100); seed++) {
            const std::string which = c.Name() + ", schedule " + std::to_string(seed);
            Expect(RunScores(c, in, seed) == scores, which + ": scores must not depend on the schedule");
            Expect(same(RunFused(c, in, seed), selection), which + ": the selection must not depend on the schedule");
            Expect(same(RunSelect(c, 1, scores, in.valid, seed), selection),
                   which + ": select_tokens must select what select_by_index selects");
        }
    }
}

void RefusalsNameTheRule()
{
    const auto refuse = [](const std::string& got, const std::string& expected) {
        Expect(got == expected, "the refusal must be '" + expected + "', got '" + got + "'");
    };
    SelectByIndexProblem good;
    good.queries = good.keys = 64;
    refuse(CheckSelectByIndex(good), "");
    const auto change = [&](const std::function<void(SelectByIndexProblem&)>& by) {
        SelectByIndexProblem p = good;
        by(p);
        return CheckSelectByIndex(p);
    };
    refuse(change([](auto& p) { p.dim = 40; }), "d_idx must be a multiple of 16 from 16 to 256, got 40 (nearest: 48)");
    refuse(change([](auto& p) { p.dim = 512; }), "d_idx must be a multiple of 16 from 16 to 256, got 512 (nearest: 256)");
    refuse(change([](auto& p) { p.block = 256; }), "block must be from 1 to 128, got 256 (nearest: 128)");
    refuse(change([](auto& p) { p.heads = 65; }), "Hi must be from 1 to 64, got 65 (nearest: 64)");
    refuse(change([](auto& p) { p.queries = 65; }), "Tq must be from 1 to 64, got 65 (nearest: 64)");
    refuse(change([](auto& p) { p.keys = 1 << 20, p.k = 5000; }), "k must be from 1 to 4032, got 5000 (nearest: 4032)");
    refuse(change([](auto& p) { p.k = 3, p.sink = 4; }),
           "k must hold the 4 keys that are always kept (sinks, and recent of every query), got 3");
}

const std::map<std::string, void (*)()> TESTS = {
    {"scores_of_random_shapes", ScoresOfRandomShapes},
    {"scores_of_long_rows", ScoresOfLongRows},
    {"selection_of_random_scores", SelectionOfRandomScores},
    {"selection_of_long_rows", SelectionOfLongRows},
    {"fused_equals_the_reference_set", FusedEqualsTheReferenceSet},
    {"fused_of_long_rows", FusedOfLongRows},
    {"full_buffers_fit", FullBuffersFit},
    {"rows_in_ub_are_those_of_the_readme", RowsInUbAreThoseOfTheReadme},
    {"ties_go_to_the_smaller_position", TiesGoToTheSmallerPosition},
    {"fused_mean_selects_by_its_scores", FusedMeanSelectsByItsScores},
    {"partitions_of_random_shapes", PartitionsOfRandomShapes},
    {"scores_are_less_their_partitions", ScoresAreLessTheirPartitions},
    {"fused_selects_less_its_partitions", FusedSelectsLessItsPartitions},
    {"nan_in_invisible_keys_does_not_leak", NanInInvisibleKeysDoesNotLeak},
    {"nan_in_future_keys_stays_in_the_future", NanInFutureKeysStaysInTheFuture},
    {"hundred_seeds_are_identical", HundredSeedsAreIdentical},
    {"refusals_name_the_rule", RefusalsNameTheRule},
};

}  // namespace

int main(int count, char** arguments)
{
    if (count < 2) {
        for (const auto& test : TESTS) {
            std::puts(test.first.c_str());
        }
        return 0;
    }
    const auto test = TESTS.find(arguments[1]);
    if (test == TESTS.end()) {
        std::printf("test must be one of those listed without arguments, got %s\n", arguments[1]);
        return 1;
    }
    repeats = count > 2 ? std::atoi(arguments[2]) : 0;
    try {
        test->second();
    } catch (const std::exception& error) {
        std::printf("%s: %s\n", arguments[1], error.what());
        return 1;
    }
    std::printf("%s: ok\n", arguments[1]);
    return 0;
}
