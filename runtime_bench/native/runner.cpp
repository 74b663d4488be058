// The native measuring process: what runtime_bench/worker.py is for Python, for machines without Python.
//
// Reads one request as JSON from stdin and writes one result as JSON to what was stdout when it began; whatever the
// libraries print goes to stderr. An expected failure is a result with `error` set; a crash leaves no result, and the
// parent reads the reason from the exit status. Requests and results are those of worker.py, field by field; a request
// with `generate` instead of `workload` asks for the greedy continuation of a prompt, to check that the engine works.
// `--about` prints what the program was built for and what this processor lacks for it.

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "llama.h"

using json = nlohmann::ordered_json;
using Tokens = std::vector<llama_token>;

namespace {

constexpr int kProtocol = 1;
constexpr size_t kMostSamples = 10000;

// A failure that belongs in a result: its text is the reason.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] void fail_errno(const std::string & path) {
    throw Failure(path + ": " + std::strerror(errno));
}

// ---- What the processor has --------------------------------------------------------------------------------------

std::set<std::string> words_of(const std::string & text) {
    std::istringstream stream(text);
    return {std::istream_iterator<std::string>(stream), {}};
}

// The features the program was compiled for and this processor does not name; empty where /proc/cpuinfo says nothing.
std::vector<std::string> missing_features() {
#if defined(__aarch64__)
    const std::string key = "Features";
#else
    const std::string key = "flags";
#endif
    std::ifstream cpuinfo("/proc/cpuinfo");
    for (std::string line; std::getline(cpuinfo, line);) {
        const auto colon = line.find(':');
        if (line.rfind(key, 0) != 0 || colon == std::string::npos) {
            continue;
        }
        const auto has = words_of(line.substr(colon + 1));
        std::vector<std::string> missing;
        for (const auto & name : words_of(RUNNER_NEEDS)) {
            if (!has.count(name)) {
                missing.push_back(name);
            }
        }
        return missing;
    }
    return {};
}

void require_features() {
    const auto missing = missing_features();
    if (missing.empty()) {
        return;
    }
    std::string names;
    for (const auto & name : missing) {
        names += " " + name;
    }
    throw Failure("the runner was built for " RUNNER_TARGET " and this processor lacks" + names);
}

// The cores that this process may run on.
json usable_cores() {
    cpu_set_t set;
    CPU_ZERO(&set);
    json cores = json::array();
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        for (int core = 0; core < CPU_SETSIZE; ++core) {
            if (CPU_ISSET(core, &set)) {
                cores.push_back(core);
            }
        }
    }
    return cores;
}

// ---- Memory and the page cache -----------------------------------------------------------------------------------

// A line of /proc/self/status in bytes; null where the system has none. VmHWM starts anew with exec.
json status_bytes(const std::string & key) {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.rfind(key + ":", 0) == 0) {
            return std::stoll(line.substr(key.size() + 1)) * 1024;
        }
    }
    return nullptr;
}

class File {
  public:
    explicit File(const std::string & path) : handle(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        if (handle < 0) {
            fail_errno(path);
        }
        struct stat facts{};
        if (fstat(handle, &facts) != 0 || !S_ISREG(facts.st_mode)) {
            close(handle);
            throw Failure(path + " is not a file");
        }
        size = static_cast<size_t>(facts.st_size);
    }
    ~File() { close(handle); }
    File(const File &) = delete;
    File & operator=(const File &) = delete;

    const int handle;
    size_t size = 0;
};

void read_once(const std::string & path) {
    File file(path);
    std::vector<char> buffer(1 << 22);
    while (read(file.handle, buffer.data(), buffer.size()) > 0) {
    }
}

// The system may refuse; page_cache_share says what came of it.
void evict(const std::string & path) {
    File file(path);
    fsync(file.handle);  // dirty pages are never dropped
    posix_fadvise(file.handle, 0, 0, POSIX_FADV_DONTNEED);
}

// Linux answers mincore truthfully only for files that the caller may write.
json page_cache_share(const std::string & path) {
    File file(path);
    if (file.size == 0 || access(path.c_str(), W_OK) != 0) {
        return nullptr;
    }
    void * view = mmap(nullptr, file.size, PROT_READ, MAP_PRIVATE, file.handle, 0);
    if (view == MAP_FAILED) {
        return nullptr;
    }
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> flags((file.size + page - 1) / page);
    const int status = mincore(view, file.size, flags.data());
    munmap(view, file.size);
    if (status != 0) {
        return nullptr;
    }
    const auto resident = std::count_if(flags.begin(), flags.end(), [](unsigned char flag) { return flag & 1; });
    return static_cast<double>(resident) / static_cast<double>(flags.size());
}

const std::map<std::string, std::function<void(const std::string &)>> kPageCache = {
    {"as_found", [](const std::string &) {}},
    {"warm", read_once},
    {"cold", evict},
};

// ---- llama.cpp's log ---------------------------------------------------------------------------------------------

// The last warnings and errors that llama.cpp logged, for the reason of a failure; and what it tells nowhere else: whether
// it chose its flash kernel, and which buffers hold the weights.
class Log {
  public:
    void add(ggml_log_level level, const char * text) {
        const std::lock_guard<std::mutex> hold(lock_);
        level_ = level == GGML_LOG_LEVEL_CONT ? level_ : level;
        if (level_ != GGML_LOG_LEVEL_INFO && level_ != GGML_LOG_LEVEL_WARN && level_ != GGML_LOG_LEVEL_ERROR) {
            return;
        }
        for (const char * letter = text; *letter; ++letter) {
            if (*letter == '\n') {
                end_line();
            } else {
                open_ += *letter;
            }
        }
    }
    json flash_attention() {
        const std::lock_guard<std::mutex> hold(lock_);
        return flash_;
    }
    json weight_buffers() {
        const std::lock_guard<std::mutex> hold(lock_);
        return buffers_;
    }
    std::string last(size_t count = 3) {
        const std::lock_guard<std::mutex> hold(lock_);
        std::string text;
        for (size_t i = lines_.size() > count ? lines_.size() - count : 0; i < lines_.size(); ++i) {
            text += (text.empty() ? "" : "; ") + lines_[i];
        }
        return text.empty() ? "llama.cpp gave no reason" : text;
    }

  private:
    void end_line() {
        const std::string mark = " model buffer size = ";
        const auto size = open_.find(mark);
        if (size != std::string::npos) {
            const auto name = open_.substr(open_.rfind(' ', size - 1) + 1, size - open_.rfind(' ', size - 1) - 1);
            const auto bytes = std::llround(std::strtod(open_.c_str() + size + mark.size(), nullptr) * (1 << 20));
            buffers_[name] = buffers_.value(name, 0LL) + bytes;
        }
        if (open_.find("Flash Attention enabled") != std::string::npos) {
            flash_ = true;
        } else if (open_.find("Flash Attention not supported") != std::string::npos) {
            flash_ = false;
        }
        if (level_ == GGML_LOG_LEVEL_INFO) {
            open_.clear();
            return;
        }
        const auto first = open_.find_first_not_of(" \t");
        if (first != std::string::npos) {
            lines_.push_back(open_.substr(first, open_.find_last_not_of(" \t") + 1 - first));
        }
        if (lines_.size() > 20) {
            lines_.pop_front();
        }
        open_.clear();
    }
    std::deque<std::string> lines_;
    std::string open_;
    ggml_log_level level_ = GGML_LOG_LEVEL_NONE;
    json flash_;
    json buffers_ = json::object();
    std::mutex lock_;
};

Log llama_log;

// ---- Random tokens -----------------------------------------------------------------------------------------------

// Python's random.Random(seed).randrange(n): the tokens are those of the Python worker.
// Mersenne Twister, Matsumoto and Nishimura 1998, seeded by init_by_array as CPython does.
class PythonRandom {
  public:
    explicit PythonRandom(uint64_t seed) {
        std::vector<uint32_t> key = {static_cast<uint32_t>(seed)};
        if (seed >> 32) {
            key.push_back(static_cast<uint32_t>(seed >> 32));
        }
        fill(19650218U);
        size_t i = 1;
        size_t j = 0;
        for (size_t k = kSize; k; --k) {
            state_[i] = (state_[i] ^ (before(i) * 1664525U)) + key[j] + static_cast<uint32_t>(j);
            i = step(i);
            j = (j + 1) % key.size();
        }
        for (size_t k = kSize - 1; k; --k) {
            state_[i] = (state_[i] ^ (before(i) * 1566083941U)) - static_cast<uint32_t>(i);
            i = step(i);
        }
        state_[0] = 0x80000000U;
    }

    uint32_t below(uint32_t limit) {
        int bits = 0;
        while (bits < 32 && (limit >> bits)) {
            ++bits;
        }
        uint32_t value;
        do {
            value = next() >> (32 - bits);
        } while (value >= limit);
        return value;
    }

  private:
    static constexpr size_t kSize = 624;
    static constexpr size_t kShift = 397;

    void fill(uint32_t seed) {
        state_[0] = seed;
        for (size_t i = 1; i < kSize; ++i) {
            state_[i] = 1812433253U * (state_[i - 1] ^ (state_[i - 1] >> 30)) + static_cast<uint32_t>(i);
        }
    }
    uint32_t before(size_t i) const { return state_[i - 1] ^ (state_[i - 1] >> 30); }
    size_t step(size_t i) {
        if (++i >= kSize) {
            state_[0] = state_[kSize - 1];
            return 1;
        }
        return i;
    }
    uint32_t next() {
        if (index_ == kSize) {
            for (size_t k = 0; k < kSize; ++k) {
                const uint32_t y = (state_[k] & 0x80000000U) | (state_[(k + 1) % kSize] & 0x7fffffffU);
                state_[k] = state_[(k + kShift) % kSize] ^ (y >> 1) ^ ((y & 1U) ? 0x9908b0dfU : 0U);
            }
            index_ = 0;
        }
        uint32_t y = state_[index_++];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680U;
        y ^= (y << 15) & 0xefc60000U;
        return y ^ (y >> 18);
    }
    uint32_t state_[kSize];
    size_t index_ = kSize;
};

// ---- An open file ------------------------------------------------------------------------------------------------

// A type of keys and values alike, as exporters/gguf/cache_types.py has it: quantized values are read in the flash kernel
// alone.
struct CacheType {
    ggml_type type;
    llama_flash_attn_type flash;
};

const std::map<std::string, CacheType> kCacheTypes = {
    {"f16", {GGML_TYPE_F16, LLAMA_FLASH_ATTN_TYPE_AUTO}},
    {"q8_0", {GGML_TYPE_Q8_0, LLAMA_FLASH_ATTN_TYPE_ENABLED}},
    {"q4_0", {GGML_TYPE_Q4_0, LLAMA_FLASH_ATTN_TYPE_ENABLED}},
};

template <typename Table> const auto & row_of(const Table & table, const std::string & name, const char * what) {
    const auto found = table.find(name);
    if (found == table.end()) {
        throw Failure("the runner knows no " + std::string(what) + " " + name);
    }
    return found->second;
}

// Settings are those of exporters/gguf/runtime.py: mapped weights, the processor alone.
class Session {
  public:
    Session(const std::string & path, const json & settings) : path_(path) {
        auto params = llama_model_default_params();
        params.n_gpu_layers = 0;
        params.load_mode = LLAMA_LOAD_MODE_MMAP;
        model_.reset(llama_model_load_from_file(path.c_str(), params));
        if (!model_) {
            throw Failure("llama.cpp cannot load " + path + ": " + llama_log.last());
        }
        vocab_ = llama_model_get_vocab(model_.get());
        const auto n_ctx = settings.at("n_ctx").get<uint32_t>();
        auto context = llama_context_default_params();
        context.n_ctx = n_ctx;
        context.n_batch = std::min(settings.at("n_batch").get<uint32_t>(), n_ctx);
        context.n_ubatch = std::min(settings.at("n_ubatch").get<uint32_t>(), context.n_batch);
        context.n_threads = context.n_threads_batch = settings.at("n_threads").get<int32_t>();
        context.n_seq_max = 1;
        context.kv_unified = false;
        const auto asked = settings.find("cache_type");
        cache_type_ = asked == settings.end() || asked->is_null() ? "f16" : asked->get<std::string>();
        const auto & cache = row_of(kCacheTypes, cache_type_, "type of a cache");
        context.type_k = context.type_v = cache.type;
        context.flash_attn_type = cache.flash;
        context.no_perf = true;
        context_.reset(llama_init_from_model(model_.get(), context));
        if (!context_) {
            throw Failure("llama.cpp cannot make a context of " + std::to_string(n_ctx) + " tokens for " + path + ": " +
                          llama_log.last());
        }
        const auto added = tokenize("");
        const auto bos = llama_vocab_bos(vocab_);
        begins_with_bos_ = !added.empty() && added[0] == bos;
    }

    json facts() const {
        char description[256] = "";
        llama_model_desc(model_.get(), description, sizeof description);
        std::string info = llama_print_system_info();
        while (!info.empty() && (info.back() == ' ' || info.back() == '|')) {
            info.pop_back();
        }
        return {
            {"model_type", description},
            {"model_size", llama_model_size(model_.get())},
            {"model_n_params", llama_model_n_params(model_.get())},
            {"backends", "CPU"},
            {"build_commit", nullptr},
            {"versions", {{"llama.cpp", llama_version()}, {"runner", RUNNER_TARGET " " RUNNER_KEY}}},
            {"system_info", info},
            {"settings",
             {{"cache_type", cache_type_},
              {"flash_attention", flash_attention()},
              {"weight_buffers", llama_log.weight_buffers()},
              {"cores", usable_cores()}}},
        };
    }

    void clear() { llama_memory_clear(llama_get_memory(context_.get()), true); }

    void decode(Tokens tokens) {
        const size_t most = llama_n_batch(context_.get());
        for (size_t start = 0; start < tokens.size(); start += most) {
            const size_t count = std::min(most, tokens.size() - start);
            const auto batch = llama_batch_get_one(tokens.data() + start, static_cast<int32_t>(count));
            const int status = llama_decode(context_.get(), batch);
            if (status == 1) {
                throw Failure(path_ + ": the text does not fit the context of " +
                              std::to_string(llama_n_ctx(context_.get())) + " tokens");
            }
            if (status != 0) {
                throw Failure("llama.cpp cannot run " + path_ + ": " + llama_log.last());
            }
        }
        llama_synchronize(context_.get());
    }

    Tokens tokenize(const std::string & text) const {
        Tokens tokens(text.size() + 8);
        for (int round = 0; round < 2; ++round) {
            const int count = llama_tokenize(vocab_, text.data(), static_cast<int32_t>(text.size()), tokens.data(),
                                             static_cast<int32_t>(tokens.size()), true, true);
            tokens.resize(static_cast<size_t>(std::abs(count)));
            if (count >= 0) {
                return tokens;
            }
        }
        throw Failure("llama.cpp cannot tokenize a text of " + std::to_string(text.size()) + " bytes with " + path_);
    }

    llama_token sample() const {
        const float * logits = llama_get_logits_ith(context_.get(), -1);
        return static_cast<llama_token>(std::max_element(logits, logits + n_vocab()) - logits);
    }

    bool ends(llama_token token) const { return llama_vocab_is_eog(vocab_, token); }

    int32_t n_vocab() const { return llama_vocab_n_tokens(vocab_); }

    Tokens random_tokens(uint64_t seed, size_t count) const {
        PythonRandom random(seed);
        Tokens tokens(count);
        for (auto & token : tokens) {
            token = static_cast<llama_token>(random.below(static_cast<uint32_t>(n_vocab())));
        }
        if (begins_with_bos_ && count) {
            tokens[0] = llama_vocab_bos(vocab_);
        }
        return tokens;
    }

  private:
    json flash_attention() const {
        const bool chosen = kCacheTypes.at(cache_type_).flash == LLAMA_FLASH_ATTN_TYPE_AUTO;
        return chosen ? llama_log.flash_attention() : json(true);
    }
    struct Free {
        void operator()(llama_model * model) const { llama_model_free(model); }
        void operator()(llama_context * context) const { llama_free(context); }
    };
    std::string path_;
    std::string cache_type_;
    std::unique_ptr<llama_model, Free> model_;
    std::unique_ptr<llama_context, Free> context_;
    const llama_vocab * vocab_ = nullptr;
    bool begins_with_bos_ = false;
};

// ---- Workloads ---------------------------------------------------------------------------------------------------

using Clock = std::chrono::steady_clock;

int64_t nanoseconds_since(Clock::time_point start) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
}

int64_t read_clock(clockid_t clock) {
    struct timespec now{};
    clock_gettime(clock, &now);
    return int64_t{now.tv_sec} * 1000000000 + now.tv_nsec;
}

// How long all threads have been ready and waited for a core, nanoseconds; -1 where nothing tells.
int64_t waited_ns() {
    DIR * const folder = opendir("/proc/self/task");
    if (!folder) {
        return -1;
    }
    int64_t sum = -1;
    while (const dirent * entry = readdir(folder)) {
        std::ifstream stats(std::string("/proc/self/task/") + entry->d_name + "/schedstat");
        int64_t ran = 0;
        int64_t waited = 0;
        if (entry->d_name[0] != '.' && stats >> ran >> waited) {
            sum = std::max<int64_t>(sum, 0) + waited;
        }
    }
    closedir(folder);
    return sum;
}

long major_faults() {
    struct rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_majflt;
}

// The fields of a result that are told of each sample; those of worker.py.
struct Samples {
    json samples_ns = json::array();
    json cpu_ns = json::array();
    json waited_ns = json::array();
    json held_ns = json::array();
    json spans_ns = json::array();
    json lasted_ns = nullptr;
};

// Do the work and time it; what takes long to look up is looked up before the clocks and after them.
void sample(const std::function<void()> & work, Samples & samples) {
    const auto faults = major_faults();
    const auto waited = waited_ns();
    const auto start = Clock::now();
    const auto cpu = read_clock(CLOCK_PROCESS_CPUTIME_ID);
    const auto own = read_clock(CLOCK_THREAD_CPUTIME_ID);
    const auto boot = read_clock(CLOCK_BOOTTIME);
    work();
    const auto wall = nanoseconds_since(start);
    const auto cpu_spent = read_clock(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    const auto own_spent = read_clock(CLOCK_THREAD_CPUTIME_ID) - own;
    samples.spans_ns.push_back({boot, read_clock(CLOCK_BOOTTIME)});
    samples.samples_ns.push_back(wall);
    samples.cpu_ns.push_back(cpu_spent);
    const auto waited_then = waited_ns();
    if (waited >= 0 && waited_then >= 0) {
        const auto waited_more = std::max<int64_t>(0, waited_then - waited);
        samples.waited_ns.push_back(waited_more);
        json held = nullptr;
        if (major_faults() == faults) {
            held = std::max<int64_t>(0, wall - own_spent - waited_more);
        }
        samples.held_ns.push_back(held);
    }
}

struct Request {
    explicit Request(const json & payload)
        : path(payload.at("path").get<std::string>()), settings(payload.at("session")),
          seed(payload.value("seed", uint64_t{0})), samples(payload.value("samples", size_t{1})),
          warmup(payload.value("warmup", true)), seconds(payload.value("seconds", 0.0)),
          page_cache(payload.value("page_cache", std::string("as_found"))) {
        const auto engine = payload.value("engine", std::string("llama.cpp"));
        if (engine != "llama.cpp") {
            throw Failure("the runner has no engine " + engine);
        }
        if (payload.contains("workload")) {
            const auto & workload = payload.at("workload");
            kind = workload.at("kind").get<std::string>();
            n_prompt = workload.value("n_prompt", size_t{0});
            n_gen = workload.value("n_gen", size_t{0});
            n_depth = workload.value("n_depth", size_t{0});
        }
    }
    std::string path;
    json settings;
    uint64_t seed;
    size_t samples;
    bool warmup;
    double seconds;
    std::string page_cache;
    std::string kind;
    size_t n_prompt = 0;
    size_t n_gen = 0;
    size_t n_depth = 0;
};

using Work = std::function<void()>;

Samples timed(Session & session, const Request & request, const Work & work, const Work & warmup) {
    Samples samples;
    if (request.warmup) {
        session.clear();
        warmup();
    }
    const auto began = Clock::now();
    int64_t passed = 0;
    const auto goes_on = [&](size_t taken) {
        return taken < request.samples ||
               (static_cast<double>(passed) < request.seconds * 1e9 && taken < kMostSamples);
    };
    while (goes_on(samples.samples_ns.size())) {
        session.clear();
        if (request.n_depth) {
            session.decode(session.random_tokens(request.seed, request.n_depth));
        }
        sample(work, samples);
        passed = nanoseconds_since(began);
    }
    samples.lasted_ns = passed;
    return samples;
}

// As llama-bench's pp: the whole prompt from an empty (or n_depth deep) context.
Samples run_prompt(Session & session, const Request & request) {
    const auto tokens = session.random_tokens(request.seed, request.n_prompt);
    const auto work = [&] { session.decode(tokens); };
    return timed(session, request, work, work);
}

// As llama-bench's tg: one token after another, drawn beforehand; sampling is not part of it.
Samples run_generation(Session & session, const Request & request) {
    const auto tokens = session.random_tokens(request.seed, request.n_gen);
    const auto work = [&] {
        for (const auto token : tokens) {
            session.decode({token});
        }
    };
    return timed(session, request, work, [&] { session.decode({tokens.at(0)}); });
}

// The text of ttft. The Python worker takes Python's own documentation, which is not where Python is not: the number of
// tokens is the same, the tokens are others.
const char * const kText =
    "A small telephone on a long journey has little room for a large model, so its owner asks which parts of the model "
    "are worth carrying. Some of them speak in almost every sentence, others wait for a word that never comes. Whoever "
    "takes the silent ones away has to look at what is left: does it still answer as before, is it quicker, does it need "
    "less memory, and does the battery last until the evening? One run says little, because the machine may be warm, or "
    "busy with something else. Ten runs in turns say more, and what they say is written down together with the day, the "
    "device, the number of threads and everything that went wrong. Then the owner compares the two, slowly, and decides.";

std::string first_words(const std::vector<std::string> & words, size_t count) {
    std::string text;
    for (size_t i = 0; i < count; ++i) {
        text += (i ? " " : "") + words[i % words.size()];
    }
    return text;
}

// English text of at least `count` tokens and hardly more: what would be tokenized in vain is timed as well.
std::string text_of(const Session & session, size_t count) {
    std::istringstream stream(kText);
    const std::vector<std::string> words{std::istream_iterator<std::string>(stream), {}};
    const auto enough = [&](size_t n) { return session.tokenize(first_words(words, n)).size() >= count; };
    size_t low = 1;
    size_t high = count;
    while (!enough(high)) {
        low = high;
        high *= 2;
    }
    while (high > low + 1) {
        const size_t middle = (low + high) / 2;
        (enough(middle) ? high : low) = middle;
    }
    return first_words(words, high);
}

// Tokenize a text, process its first n_prompt tokens, sample one.
Samples run_first_token(Session & session, const Request & request) {
    if (!request.n_prompt) {
        throw Failure("ttft wants a prompt");
    }
    const auto text = text_of(session, request.n_prompt);
    const auto work = [&] {
        auto tokens = session.tokenize(text);
        tokens.resize(request.n_prompt);
        session.decode(std::move(tokens));
        session.sample();
    };
    return timed(session, request, work, work);
}

// Nothing more to time: the opening was the sample.
Samples run_load(Session &, const Request &) {
    return {};
}

const std::map<std::string, std::function<Samples(Session &, const Request &)>> kWorkloads = {
    {"load", run_load},
    {"pp", run_prompt},
    {"tg", run_generation},
    {"ttft", run_first_token},
    {"start", run_first_token}};

// Workloads that time the opening of the file, too.
bool opens(const std::string & kind) { return kind == "load" || kind == "start"; }

// ---- Requests ----------------------------------------------------------------------------------------------------

json empty_result() {
    return {{"samples_ns", json::array()}, {"load_ns", nullptr},        {"page_cache_share", nullptr},
            {"baseline_rss_bytes", nullptr}, {"peak_rss_bytes", nullptr}, {"facts", nullptr},
            {"error", nullptr},            {"memory_verdict", nullptr}, {"reread_bytes", nullptr},
            {"cpu_ns", json::array()},     {"waited_ns", json::array()}, {"held_ns", json::array()},
            {"spans_ns", json::array()},   {"lasted_ns", nullptr}};
}

json measure(const Request & request) {
    auto result = empty_result();
    const auto & workload = row_of(kWorkloads, request.kind, "workload");
    row_of(kPageCache, request.page_cache, "state of the page cache")(request.path);
    result["page_cache_share"] = page_cache_share(request.path);
    result["baseline_rss_bytes"] = status_bytes("VmRSS");
    const auto start = Clock::now();
    Session session(request.path, request.settings);
    const auto load_ns = nanoseconds_since(start);
    auto samples = workload(session, request);
    result["load_ns"] = load_ns;
    if (opens(request.kind)) {  // the clocks beside the wall's were not read while the file was opened
        const auto whole = load_ns + (samples.samples_ns.empty() ? 0 : samples.samples_ns[0].get<int64_t>());
        samples = Samples();
        samples.samples_ns.push_back(whole);
    }
    result["samples_ns"] = samples.samples_ns;
    result["cpu_ns"] = samples.cpu_ns;
    result["waited_ns"] = samples.waited_ns;
    result["held_ns"] = samples.held_ns;
    result["spans_ns"] = samples.spans_ns;
    result["lasted_ns"] = samples.lasted_ns;
    result["facts"] = session.facts();
    result["peak_rss_bytes"] = status_bytes("VmHWM");
    return result;
}

// The greedy continuation of a prompt in an empty context, as exporters/gguf/runtime.py's LlamaModel.generate. Without a
// prompt it is `n_random` random tokens, those that the workloads are made of.
json generate(const Request & request, const json & wanted) {
    Session session(request.path, request.settings);
    const auto prompt = wanted.contains("prompt")
                            ? wanted.at("prompt").get<Tokens>()
                            : session.random_tokens(request.seed, wanted.at("n_random").get<size_t>());
    const auto most = wanted.at("max_new_tokens").get<size_t>();
    const bool stops = wanted.value("stop_at_end", true);
    if (prompt.empty()) {
        throw Failure("generate wants a prompt");
    }
    session.decode(prompt);
    Tokens tokens;
    while (tokens.size() < most) {
        const auto token = session.sample();
        if (stops && session.ends(token)) {
            break;
        }
        tokens.push_back(token);
        if (tokens.size() < most) {
            session.decode({token});
        }
    }
    return {{"tokens", tokens},
            {"prompt", prompt},
            {"facts", session.facts()},
            {"peak_rss_bytes", status_bytes("VmHWM")},
            {"error", nullptr}};
}

json serve(std::istream & input) {
    try {
        const auto payload = json::parse(input);
        const Request request(payload);
        require_features();
        llama_backend_init();
        return payload.contains("generate") ? generate(request, payload.at("generate")) : measure(request);
    } catch (const json::exception & error) {
        return {{"error", std::string("unreadable request: ") + error.what()}};
    } catch (const std::bad_alloc &) {
        return {{"error", "out of memory"}};
    } catch (const std::exception & error) {
        return {{"error", error.what()}};
    }
}

json about() {
    return {{"protocol", kProtocol},      {"target", RUNNER_TARGET},        {"key", RUNNER_KEY},
            {"llama.cpp", llama_version()}, {"missing", missing_features()}};
}

}  // namespace

int main(int count, char ** arguments) {
    const bool asked = count == 2 && std::string(arguments[1]) == "--about";
    if (count > 1 && !asked) {
        std::cerr << "usage: phoneready-runner [--about] < request.json > result.json\n";
        return 2;
    }
    // Whatever the libraries print must not come between the result's lines.
    const int results = dup(STDOUT_FILENO);
    dup2(STDERR_FILENO, STDOUT_FILENO);
    llama_log_set([](ggml_log_level level, const char * text, void *) { llama_log.add(level, text); }, nullptr);
    auto result = asked ? about() : serve(std::cin);
    if (!asked && !result.contains("samples_ns") && !result.contains("tokens")) {
        auto failed = empty_result();
        failed["error"] = result["error"];
        failed["peak_rss_bytes"] = status_bytes("VmHWM");
        result = failed;
    }
    const auto text = result.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
    for (size_t done = 0; done < text.size();) {
        const auto written = write(results, text.data() + done, text.size() - done);
        if (written < 0) {
            return 1;
        }
        done += static_cast<size_t>(written);
    }
    return 0;
}
