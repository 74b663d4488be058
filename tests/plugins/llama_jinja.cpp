// Renders chat templates with llama.cpp's own Jinja: a line of JSON in, {"template": ..., "context": {...}},
// a line out, {"text": ...} or {"error": ...}.

#include <cstdlib>
#include <iostream>
#include <string>

#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json.h"

// What ggml calls where an assertion fails; no more of ggml is linked.
extern "C" void ggml_abort(const char * file, int line, const char *, ...) {
    std::cerr << file << ":" << line << std::endl;
    std::abort();
}

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        common_json answer = common_json::object();
        try {
            const common_json request = common_json::parse(line);
            const std::string source = request.at("template").get<std::string>();
            jinja::lexer lexer;
            auto tokens = lexer.tokenize(source);
            jinja::program program = jinja::parse_from_tokens(tokens);
            jinja::context context(source);
            jinja::global_from_json(context, request.at("context"), false);
            jinja::runtime runtime(context);
            const auto results = runtime.execute(program);
            answer["text"] = jinja::runtime::gather_string_parts(results)->as_string().str();
        } catch (const std::exception & error) {
            answer["error"] = std::string(error.what());
        }
        std::cout << answer.dump() << std::endl;
    }
}
