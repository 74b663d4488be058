package com.example.chat

import android.app.Activity
import android.os.Bundle
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import java.io.File
import java.util.concurrent.Executors

/** One conversation with the model of the asset pack. Everything that takes time is done by one thread. */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private val messages = mutableListOf(Message("system", "You are a helpful assistant."))
    private var chat: Chat? = null  // the worker's
    @Volatile private var leaving = false

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        val said = TextView(this)
        val question = EditText(this)
        val send = Button(this).apply { text = getString(R.string.send) }
        send.setOnClickListener {
            val asked = question.text.toString()
            if (asked.isNotBlank()) {
                question.text.clear()
                said.append("\n> $asked\n")
                send.isEnabled = false
                worker.execute {
                    answer(asked, said)
                    runOnUiThread { send.isEnabled = true }
                }
            }
        }
        setContentView(LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            fitsSystemWindows = true
            addView(ScrollView(context).apply { addView(said) }, LinearLayout.LayoutParams(-1, 0, 1f))
            addView(question)
            addView(send)
        })
    }

    override fun onDestroy() {
        leaving = true
        worker.execute { chat?.close() }
        worker.shutdown()
        super.onDestroy()
    }

    private fun answer(asked: String, said: TextView) {
        val show = { text: String -> runOnUiThread { said.append(text) } }
        val asking = messages + Message("user", asked)
        try {
            val answer = (chat ?: open().also { chat = it }).answer(asking) { text ->
                show(text)
                !leaving
            }
            messages += listOf(asking.last(), Message("assistant", answer.text))
            show(if (answer.cut) " (the context is full)\n" else "\n")
        } catch (problem: Exception) {
            show("(${problem.message})\n")
        }
    }

    private fun open(): Chat {
        val name = checkNotNull(assets.list("")?.find { it.endsWith(".gguf") }) { "the app has no model" }
        val version = packageManager.getPackageInfo(packageName, 0).lastUpdateTime.toString()
        return Chat(modelFile(File(noBackupFilesDir, "model"), version, name) { assets.open(name) })
    }
}
