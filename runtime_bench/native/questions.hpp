// What a file answers about texts; the questions are those of runtime_bench/questions.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "machine.hpp"
#include "session.hpp"

namespace runner {

// What is computed together is what exporters/gguf/runtime.py computes together, so that rounding is the same.

// Runs of sequences of these lengths that are computed at once, beside tokens that all of them share: (first, behind).
inline std::vector<std::pair<size_t, size_t>> fitting(const std::vector<size_t> & lengths, size_t shared,
                                                      size_t n_ctx, size_t most) {
    std::vector<std::pair<size_t, size_t>> runs;
    size_t start = 0;
    size_t used = shared;
    for (size_t i = 0; i < lengths.size(); ++i) {
        if (shared + lengths[i] > n_ctx) {
            throw Failure("a question has " + std::to_string(shared + lengths[i]) +
                          " tokens, more than the context of " + std::to_string(n_ctx));
        }
        if (i - start == most || used + lengths[i] > n_ctx) {
            runs.emplace_back(start, i);
            start = i;
            used = shared;
        }
        used += lengths[i];
    }
    runs.emplace_back(start, lengths.size());
    return runs;
}

// ln of the sum of exp of a row of logits.
inline double log_sum(const float * row, int32_t n_vocab) {
    const double most = *std::max_element(row, row + n_vocab);
    if (!std::isfinite(most) || std::any_of(row, row + n_vocab, [](float logit) { return std::isnan(logit); })) {
        throw Failure("the model gives logits that are not finite");
    }
    double sum = 0;
    for (int32_t i = 0; i < n_vocab; ++i) {
        sum += std::exp(row[i] - most);
    }
    return most + std::log(sum);
}

// How the model sees continuations of one context, those of a part: (ln p, whether each token is its first choice).
inline void score_part(Session & session, const Tokens & context, const std::vector<Tokens> & continuations,
                       size_t first, size_t behind, json & likelihoods, json & greedy) {
    const size_t count = behind - first;
    std::vector<llama_seq_id> everyone(count);
    std::iota(everyone.begin(), everyone.end(), 0);
    std::vector<Entry> entries;
    for (size_t i = 0; i < context.size(); ++i) {
        entries.push_back({context[i], static_cast<llama_pos>(i), everyone, i + 1 == context.size()});
    }
    std::vector<std::pair<size_t, size_t>> places = {{0, 0}};  // of the tokens that later rows predict
    for (size_t k = 0; k < count; ++k) {
        const auto & tokens = continuations[first + k];
        for (size_t i = 0; i + 1 < tokens.size(); ++i) {
            const auto position = static_cast<llama_pos>(context.size() + i);
            entries.push_back({tokens[i], position, {static_cast<llama_seq_id>(k)}, true});
            places.emplace_back(k, i + 1);
        }
    }
    std::vector<double> sums(count);
    std::vector<char> first_choice(count, 1);
    size_t row = 0;
    session.clear();
    session.decode(entries, [&](const float * logits) {
        const double total = log_sum(logits, session.n_vocab());
        const auto best = session.likeliest(logits);
        const auto see = [&](size_t k, size_t i) {
            const auto token = continuations[first + k].at(i);
            sums[k] += logits[token] - total;
            first_choice[k] = first_choice[k] && token == best;
        };
        for (size_t k = 0; row == 0 && k < count; ++k) {
            see(k, 0);
        }
        if (row > 0) {
            see(places[row].first, places[row].second);
        }
        ++row;
    });
    for (size_t k = 0; k < count; ++k) {
        likelihoods.push_back(sums[k]);
        greedy.push_back(static_cast<bool>(first_choice[k]));
    }
}

inline void check_tokens(const Session & session, const Tokens & tokens) {
    const auto strange = [&](llama_token token) { return token < 0 || token >= session.n_vocab(); };
    if (tokens.empty() || std::any_of(tokens.begin(), tokens.end(), strange)) {
        throw Failure("a question has no tokens, or some that the file does not have");
    }
}

inline json score(Session & session, const json & question) {
    const auto context = question.at("context").get<Tokens>();
    const auto continuations = question.at("continuations").get<std::vector<Tokens>>();
    check_tokens(session, context);
    if (continuations.empty()) {
        throw Failure("a question has no continuations");
    }
    std::vector<size_t> lengths;
    for (const auto & continuation : continuations) {
        check_tokens(session, continuation);
        lengths.push_back(continuation.size() - 1);
    }
    json likelihoods = json::array();
    json greedy = json::array();
    const size_t most = session.is_recurrent() ? 1 : session.n_seq();
    for (const auto & [first, behind] : fitting(lengths, context.size(), session.n_ctx(), most)) {
        score_part(session, context, continuations, first, behind, likelihoods, greedy);
    }
    return {{"log_likelihoods", likelihoods}, {"greedy", greedy}};
}

// A text that is being written.
struct Text {
    Tokens tokens;
    std::string said;
};

// Greedy continuations of prompts that are computed at once.
inline std::vector<Tokens> write_part(Session & session, const std::vector<Tokens> & prompts, size_t first,
                                      size_t behind, size_t most, const std::vector<std::string> & stops) {
    std::vector<Text> texts(behind - first);
    std::vector<size_t> going(texts.size());
    std::iota(going.begin(), going.end(), 0);
    std::vector<Entry> entries;
    for (const auto k : going) {
        const auto & prompt = prompts[first + k];
        for (size_t i = 0; i < prompt.size(); ++i) {
            const auto position = static_cast<llama_pos>(i);
            entries.push_back({prompt[i], position, {static_cast<llama_seq_id>(k)}, i + 1 == prompt.size()});
        }
    }
    const auto stopped = [&](const std::string & said) {
        return std::any_of(stops.begin(), stops.end(),
                           [&](const auto & stop) { return said.find(stop) != std::string::npos; });
    };
    session.clear();
    while (!going.empty()) {
        Tokens best;
        session.decode(entries, [&](const float * logits) { best.push_back(session.likeliest(logits)); });
        entries.clear();
        std::vector<size_t> still;
        for (size_t i = 0; i < going.size(); ++i) {
            auto & text = texts[going[i]];
            if (session.ends(best[i])) {
                continue;
            }
            text.tokens.push_back(best[i]);
            text.said += session.piece(best[i]);
            if (text.tokens.size() < most && !stopped(text.said)) {
                const auto position = prompts[first + going[i]].size() + text.tokens.size() - 1;
                const auto sequence = static_cast<llama_seq_id>(going[i]);
                entries.push_back({best[i], static_cast<llama_pos>(position), {sequence}, true});
                still.push_back(going[i]);
            }
        }
        going = still;
    }
    std::vector<Tokens> written;
    for (auto & text : texts) {
        written.push_back(std::move(text.tokens));
    }
    return written;
}

inline json write_on(Session & session, const json & question) {
    const auto prompts = question.at("prompts").get<std::vector<Tokens>>();
    const auto most = question.at("max_new_tokens").get<size_t>();
    const auto stops = question.at("stop_strings").get<std::vector<std::string>>();
    std::vector<size_t> lengths;
    for (const auto & prompt : prompts) {
        check_tokens(session, prompt);
        lengths.push_back(prompt.size() + most);
    }
    json written = json::array();
    for (const auto & [first, behind] : fitting(lengths, 0, session.n_ctx(), session.n_seq())) {
        for (auto & tokens : write_part(session, prompts, first, behind, most, stops)) {
            written.push_back(std::move(tokens));
        }
    }
    return {{"written", written}};
}

inline json spell(Session & session, const json & question) {
    return {{"ids", session.tokenize(question.at("text").get<std::string>())}};
}

// What a question has, which says what is asked.
inline const std::vector<std::pair<std::string, std::function<json(Session &, const json &)>>> kQuestions = {
    {"continuations", score}, {"prompts", write_on}, {"text", spell}};

inline json answer_one(Session & session, const json & question) {
    for (const auto & [key, answer] : kQuestions) {
        if (question.contains(key)) {
            return answer(session, question);
        }
    }
    throw Failure("the runner does not know what is asked");
}

// Answers to a file of questions, one a line, in their order.
inline json answer(const std::string & path, const json & settings, const std::string & questions) {
    std::ifstream lines(questions);
    if (!lines) {
        fail_errno(questions);
    }
    Session session(path, settings);
    json answers = json::array();
    for (std::string line; std::getline(lines, line);) {
        answers.push_back(answer_one(session, json::parse(line)));
    }
    return {{"answers", answers},
            {"facts", session.facts()},
            {"peak_rss_bytes", status_bytes("VmHWM")},
            {"error", nullptr}};
}

}  // namespace runner
