// What the machine is and does with files: features, cores, memory, the page cache.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace runner {

using json = nlohmann::ordered_json;

// A failure that belongs in a result: its text is the reason.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail_errno(const std::string & path) {
    throw Failure(path + ": " + std::strerror(errno));
}

inline std::set<std::string> words_of(const std::string & text) {
    std::istringstream stream(text);
    return {std::istream_iterator<std::string>(stream), {}};
}

// The features the program was compiled for and this processor does not name; empty where /proc/cpuinfo says nothing.
inline std::vector<std::string> missing_features() {
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

inline void require_features() {
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
inline json usable_cores() {
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

// A line of /proc/self/status in bytes; null where the system has none. VmHWM starts anew with exec.
inline json status_bytes(const std::string & key) {
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

inline void read_once(const std::string & path) {
    File file(path);
    std::vector<char> buffer(1 << 22);
    while (read(file.handle, buffer.data(), buffer.size()) > 0) {
    }
}

// The system may refuse; page_cache_share says what came of it.
inline void evict(const std::string & path) {
    File file(path);
    fsync(file.handle);  // dirty pages are never dropped
    posix_fadvise(file.handle, 0, 0, POSIX_FADV_DONTNEED);
}

// Linux answers mincore truthfully only for files that the caller may write.
inline json page_cache_share(const std::string & path) {
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

inline const std::map<std::string, std::function<void(const std::string &)>> kPageCache = {
    {"as_found", [](const std::string &) {}},
    {"warm", read_once},
    {"cold", evict},
};

}  // namespace runner
