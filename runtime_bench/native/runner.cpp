// The native measuring process: what runtime_bench/worker.py is for Python, for machines without Python.
//
// Reads one request as JSON from stdin and writes one result as JSON to what was stdout when it began; whatever the
// libraries print goes to stderr. An expected failure is a result with `error` set; a crash leaves no result, and the
// parent reads the reason from the exit status. Requests and results are those of worker.py, field by field; a request
// with `questions` instead of `workload` names a file of them (runtime_bench/questions.py), and one with `generate` asks
// for the greedy continuation of a prompt, to check that the engine works.
// `--about` prints what the program was built for and what this processor lacks for it.

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <new>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"
#include "llama_log.hpp"
#include "machine.hpp"
#include "questions.hpp"
#include "session.hpp"

using namespace runner;

namespace {

constexpr int kProtocol = 1;
constexpr size_t kMostSamples = 10000;

// ---- Workloads ------------------------------------------------------------------------------------------------------

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

// ---- Requests -------------------------------------------------------------------------------------------------------

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
        if (payload.contains("questions")) {
            return answer(request.path, request.settings, payload.at("questions").get<std::string>());
        }
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
    const auto has = [&](const char * key) { return result.contains(key); };
    if (!asked && !has("samples_ns") && !has("tokens") && !has("answers")) {
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
