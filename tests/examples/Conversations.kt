// What test_android.py asks of the app: lines of Base64 come in and go out, fields between tabs.
import com.example.chat.Characters
import com.example.chat.Chat
import com.example.chat.Message
import com.example.chat.Sampling
import com.example.chat.modelFile
import java.io.File
import java.io.IOException
import java.io.InputStream
import java.util.Base64
import kotlin.concurrent.thread

fun main(arguments: Array<String>) = when (arguments[0]) {
    "answer" -> answer(File(arguments[1]), arguments[2].toInt(), Sampling(arguments[3].toFloat(), 1f, arguments[4].toInt()))
    "place" -> place(File(arguments[1]), arguments[2], File(arguments[3]))
    else -> spell(Base64.getDecoder().decode(arguments[1]))
}

/** Conversations: after how many pieces the answer is stopped (0: never), then roles and contents in turns. */
private fun answer(file: File, contextTokens: Int, sampling: Sampling) {
    val chat = try {
        Chat(file, contextTokens, threads = 1, sampling)
    } catch (problem: RuntimeException) {
        return say("failed", problem.message.orEmpty())
    }
    for (line in generateSequence(::readlnOrNull)) {
        val fields = line.split("\t").map { String(Base64.getDecoder().decode(it)) }
        val messages = fields.drop(1).chunked(2) { (role, content) -> Message(role, content) }
        val pieces = mutableListOf<String>()
        saying {
            val answer = chat.answer(messages) { pieces.add(it) && pieces.size != fields[0].toInt() }
            say(if (answer.cut) "cut" else "answered", answer.text, *pieces.toTypedArray())
        }
    }
    val last = listOf(Message("user", "Still there?"))
    saying { chat.answer(last) { chat.close(); true } }
    chat.close()
    chat.close()
    saying { chat.answer(last) }
}

/** Two at once; then of an asset that ends in the middle. */
private fun place(folder: File, version: String, asset: File) {
    var opened = 0
    List(2) { thread { modelFile(folder, version, "model.gguf") { asset.inputStream().also { opened++ } } } }.forEach { it.join() }
    val files = folder.walk().filter { it.isFile }.map { "${it.relativeTo(folder)}: ${it.length()}" }
    say("placed", opened.toString(), files.joinToString())
    saying {
        modelFile(folder, "broken", "model.gguf") {
            object : InputStream() {
                private var left = 3_000_000
                override fun read() = if (left-- > 0) 7 else throw IOException("no more")
            }
        }
    }
}

private fun spell(bytes: ByteArray) {
    val characters = Characters()
    say("spelled", *bytes.map { characters.of(byteArrayOf(it)) }.toTypedArray(), characters.rest())
}

private fun saying(action: () -> Unit) = try {
    action()
} catch (problem: Exception) {
    say("failed", problem.message.orEmpty())
}

private fun say(vararg fields: String) =
    println(fields.joinToString("\t") { Base64.getEncoder().encodeToString(it.toByteArray()) })
