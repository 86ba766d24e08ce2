from sasa_train.predict import main

main()
